"""README's commands and Python run as they stand there; only their amounts are made small."""

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
    ("data", "synth"): "--train 6 --val 3 --test 3",
    ("train",): "--steps 3 --batch 2 --crop 64x64 --set network.options.width_mult=0.25",
    ("bench",): "--rounds 2",
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
            return [*words, *shlex.split(more)]
    return words


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all of README's commands ran, in their order."""
    folder = tmp_path_factory.mktemp("readme")
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
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return folder


def test_the_readme_shows_every_verb_of_the_main_job() -> None:
    shown = {tuple(shlex.split(line)[1:3]) for line in commands()}
    verbs = {words[0] for words in shown}
    assert {"train", "export", "certify", "evaluate", "predict", "bench", "data"} <= verbs


@pytest.mark.timeout(900)
def test_the_commands_of_the_readme_leave_what_they_promise(workshop: Path) -> None:
    for kind in ("baseline", "regulated"):
        for name in ("model.onnx", "manifest.json", "certificate.json"):
            assert (workshop / "deploy" / kind / name).is_file()
    photos = list((workshop / "scenes" / "images" / "test").iterdir())
    assert len(list((workshop / "masks").glob("scene_*.png"))) == len(photos) == 3


@pytest.mark.timeout(900)
def test_the_python_of_the_readme_runs(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.chdir(workshop)
    batch = (torch.rand(2, 3, 64, 64), torch.randint(8, (2, 64, 64)))
    own_loop, own_photos = python_blocks()
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
