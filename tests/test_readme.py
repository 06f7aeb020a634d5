"""README's commands and Python run as they stand there; only their amounts are made small."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"

# What each verb gets on top of README's words, so that the suite takes seconds instead of hours.
SMALLER = {
    ("data", "synth"): "--train 8 --val 3 --test 3",
    ("train",): "--steps 3 --batch 2 --crop 64x64",
    ("bench", "train"): "--rounds 3 --size 32x32 --option width_mult=0.25",
    ("bench",): "--budget 1 --threads 1 --no-costs",
}


def commands() -> list[str]:
    lines = README.read_text().splitlines()
    return [line.strip() for line in lines if line.startswith("    srdeploy ")]


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def smaller(command: str) -> list[str]:
    words = shlex.split(command, comments=True)[1:]
    for verb, more in SMALLER.items():
        if tuple(words[: len(verb)]) == verb:
            words = [*words, *shlex.split(more)]
            break
    if words[0] == "train" and "--network" not in words:
        words += ["--option", "width_mult=0.25"]
    return words


def write_own_network(folder: Path) -> None:
    """my_package/models.py as README shows it, with a network of a hundredth of the size."""
    code = next(block for block in python_blocks() if block.startswith("# my_package/models.py"))
    small = "num_labels=classes, depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 16, 24]"
    small += ", num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16"
    assert "num_labels=classes" in code
    (folder / "my_package").mkdir()
    (folder / "my_package" / "models.py").write_text(code.replace("num_labels=classes", small))


def write_foreign_file(path: Path) -> None:
    """model.onnx as another tool would leave it: outputs out and aux, no word of srdeploy in it."""
    from onnx import TensorProto, checker, helper, numpy_helper, save

    rng = np.random.default_rng(0)
    nodes = []
    weights = []
    for name, source, inputs, outputs, stride in (
        ("stem", "input", 3, 8, 2),
        ("out", "stem", 8, 8, 1),
        ("aux", "stem", 8, 8, 1),
    ):
        kernel = rng.normal(size=(outputs, inputs, 3, 3)).astype(np.float32)
        weights.append(numpy_helper.from_array(kernel, f"{name}.weight"))
        nodes.append(
            helper.make_node(
                "Conv",
                [source, f"{name}.weight"],
                [name],
                name=name,
                strides=[stride, stride],
                pads=[1] * 4,
            )
        )
    graph = helper.make_graph(
        nodes,
        "two heads",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["b", 3, "h", "w"])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 8, None, None])
            for name in ("out", "aux")
        ],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    checker.check_model(model)
    save(model, path)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all of README's commands ran, in their order."""
    folder = tmp_path_factory.mktemp("readme")
    write_own_network(folder)
    write_foreign_file(folder / "model.onnx")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for command in commands():
        result = subprocess.run(
            [sys.executable, "-m", "srdeploy", *smaller(command)],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
        )
        told = f"{command}\n{result.stdout}\n{result.stderr}"
        if result.returncode == 1 and "--precision int8" in command:
            # A network of three steps is unsure everywhere: 8 bits change labels of it.
            certificate = json.loads(
                (folder / "deploy/regulated-int8/certificate.json").read_text()
            )
            failed = [line["name"] for line in certificate["lines"] if line["passed"] is False]
            assert failed == ["verification"], told
        elif result.returncode == 1 and command.startswith("srdeploy bench "):
            # A second of a busy machine shows nothing, and says so.
            assert "NOT SHOWN" in result.stderr or "DIFFERENT" in result.stderr, told
        else:
            assert result.returncode == 0, told
    return folder


def test_the_readme_shows_every_verb_of_the_main_job() -> None:
    shown = {tuple(shlex.split(line)[1:3]) for line in commands()}
    verbs = {words[0] for words in shown}
    main_job = {"train", "export", "certify", "evaluate", "predict", "bench", "data", "doctor"}
    assert main_job | {"inspect", "strip", "models"} <= verbs


@pytest.mark.timeout(900)
def test_the_commands_of_the_readme_leave_what_they_promise(workshop: Path) -> None:
    for kind in ("baseline", "regulated"):
        for name in ("model.onnx", "manifest.json", "certificate.json"):
            assert (workshop / "deploy" / kind / name).is_file()
    photos = list((workshop / "scenes" / "images" / "test").iterdir())
    assert len(list((workshop / "masks").glob("scene_*.png"))) == len(photos) == 3
    assert (
        "<svg" in (workshop / "inspect.html").read_text()
        or "<img" in (workshop / "inspect.html").read_text()
    )
    for name in ("deploy/mine/model.onnx", "deploy/theirs/model.onnx", "model.stripped.onnx"):
        assert (workshop / name).is_file()
    for name in ("fp16/differences.html", "int8/model.onnx"):
        assert (workshop / f"deploy/regulated-{name}").is_file()
    for name in ("bench/report.html", "bench/report.json", "matrix/report.html"):
        assert (workshop / name).is_file()
    assert (workshop / "deploy" / "rtx" / "model.sm89.engine.json").is_file()
    assert (workshop / "repository" / "regulated" / "config.pbtxt").is_file()


@pytest.mark.timeout(900)
def test_the_python_of_the_readme_runs(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.chdir(workshop)
    batch = (torch.rand(2, 3, 64, 64), torch.randint(8, (2, 64, 64)))
    _, own_loop, own_photos = python_blocks()
    found: dict[str, object] = {"torch": torch, "batches": [batch] * 2}
    exec(own_loop, found)
    assert (workshop / "plain.pt").is_file()
    photos: dict[str, object] = {"images": np.zeros((1, 64, 96, 3), np.uint8)}
    exec(own_photos, photos)
    labels = photos["labels"]
    assert isinstance(labels, np.ndarray)
    assert (labels.shape, labels.dtype) == ((1, 64, 96), np.uint8)


def test_the_file_tree_of_the_readme_names_things_that_exist() -> None:
    tree = README.read_text().split("## Where things are")[1]
    parent = ""
    named = []
    for line in tree.splitlines():
        match = re.match(r"    (  )?(\S+?)(/?) ", line)
        if match is None:
            continue
        nested, name, slash = match.groups()
        named.append(ROOT / (parent if nested else "") / name)
        if slash and not nested:
            parent = name
    assert len(named) > 10
    assert [str(path) for path in named if not path.exists()] == []
