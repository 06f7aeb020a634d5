"""Fixtures that several parts share: a tiny data set, written with Pillow, that a tiny network can
learn; graphs with known answers, written with onnx; and one small run exported in every form.

The colour graph's classes are the colours of the tiny data set: field is green, box red, disc blue.
"""

import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from srdeploy.data import open_dataset, spec_for
from srdeploy.files import write_json, write_whole
from srdeploy.spec import InputPolicy, Spec

if TYPE_CHECKING:  # torch is imported by the tests that need it
    from srdeploy.deployable import InputKind

MakeGraph = Callable[..., Path]

LONGEST = ("test_readme.py", "test_every_network.py", "test_demo.py")
"""Files that take minutes: with several workers they must not be the ones that come last."""

TINY_SIZE = (40, 48)
"""(height, width) of the tiny set's photos."""
TINY_PALETTE = [[40, 160, 60], [200, 60, 40], [40, 70, 200]]


@pytest.hookimpl(tryfirst=True)  # xdist's own hook reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker for each file, since its tests share what they made, and for each network in the
    file that takes all networks the whole way; the longest begin."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            call = getattr(item, "callspec", None)
            network = call.params.get("journey") if call is not None else None
            item.add_marker(pytest.mark.xdist_group(f"{item.path.name} {network or ''}".strip()))


def write_tiny_data(root: Path, train: int = 6, val: int = 3, seed: int = 0) -> Path:
    """The folder layout with classes field, box, disc; a void rim around the discs; noise on the
    colours."""
    for split, count, offset in (("train", train, 0), ("val", val, 1000)):
        (root / "images" / split).mkdir(parents=True)
        (root / "labels" / split).mkdir(parents=True)
        for index in range(count):
            rng = np.random.default_rng([seed, offset + index])
            photo, labels = _tiny_scene(rng)
            Image.fromarray(photo).save(root / "images" / split / f"{split}_{index:02d}.png")
            Image.fromarray(labels).save(root / "labels" / split / f"{split}_{index:02d}.png")
    table = {
        "names": ["field", "box", "disc"],
        "palette": TINY_PALETTE,
        "ignore_index": 255,
        "void_colour": [224, 224, 192],
    }
    (root / "classes.json").write_text(json.dumps(table))
    return root


def _tiny_scene(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    height, width = TINY_SIZE
    labels = np.zeros((height, width), np.uint8)
    top, left = (int(v) for v in rng.integers(2, 12, 2))
    labels[top : top + 14, left : left + 12] = 1
    rows, columns = np.mgrid[:height, :width]
    distance = np.hypot(rows - rng.integers(14, 30), columns - rng.integers(28, 40))
    labels[distance < 8] = 255
    labels[distance < 7] = 2
    colours = np.array([*TINY_PALETTE, *[[128, 128, 128]] * 253], np.int64)[labels]
    noise = rng.integers(-30, 31, (height, width, 3))
    return np.clip(colours + noise, 0, 255).astype(np.uint8), labels


@pytest.fixture(autouse=True)
def loud() -> Iterator[None]:
    """Verbs silence the console for the whole process: no test may inherit that from another."""
    from srdeploy import console

    console.set_quiet(False)
    yield
    console.set_quiet(False)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws without a seed of its own is the same whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:  # importing it takes seconds, and not all tests need it
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def srdeploy(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs `srdeploy ARGUMENTS` in this process; returns the exit code, stdout and stderr."""
    from srdeploy.cli.main import main

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["srdeploy", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        captured = capfd.readouterr()
        return int(exit.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A read-only data set in the folder layout: 3 classes, 6 train and 3 val photos of 48x40 (W x
    H)."""
    return write_tiny_data(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="session")
def browser_path() -> str:
    """A Chromium on this machine; without one the test is skipped, but not where CI insists."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        assert "SRDEPLOY_REQUIRE_BROWSER" not in os.environ, "CI must bring a browser"
        pytest.skip("no chromium on this machine: pages were NOT tested in a browser")
    return found


@pytest.fixture(scope="session")
def tiny_spec(tiny_data: Path) -> Spec:
    """The spec of the tiny data set: 3 classes, any size from 32 x 32."""
    return spec_for(open_dataset(tiny_data, "val"))


@pytest.fixture
def make_graph(tmp_path: Path, tiny_spec: Spec) -> MakeGraph:
    """Writes a graph whose label is the strongest of green, red and blue."""

    def make(
        name: str = "colour.onnx",
        input: str = "uint8",
        output: str = "labels",
        size: tuple[Any, Any, Any] = ("N", "H", "W"),
        spec: Spec | None = tiny_spec,
        label_type: int = TensorProto.UINT8,
        stride: int = 1,
        work: int = 0,
    ) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        model = colour_model(input, output, size, label_type, stride, work)
        if spec is not None:
            model.metadata_props.add(key="srdeploy.spec", value=spec.to_json())
        onnx.save(model, str(path))
        return path

    return make


def colour_model(
    input: str,
    output: str,
    size: tuple[Any, Any, Any],
    label_type: int,
    stride: int,
    work: int,
) -> onnx.ModelProto:
    """`stride` > 1 gives logits at 1/stride of the size; `work` adds idle convolutions."""
    count, height, width = size
    kernel = np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1]], np.float32).reshape(3, 3, 1, 1)
    weights = [numpy_helper.from_array(kernel, "kernel")]
    nodes = []
    if input == "uint8":
        images = helper.make_tensor_value_info(
            "images", TensorProto.UINT8, [count, height, width, 3]
        )
        nodes += [
            helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Transpose", ["floats"], ["planes"], perm=[0, 3, 1, 2]),
        ]
    else:
        images = helper.make_tensor_value_info(
            "planes", TensorProto.FLOAT, [count, 3, height, width]
        )
    previous = "planes"
    if work:
        spread = np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1)
        spread = np.pad(spread, ((0, 0), (0, 0), (3, 3), (3, 3)))
        weights.append(numpy_helper.from_array(spread, "spread"))
    for step in range(work):
        nodes.append(
            helper.make_node("Conv", [previous, "spread"], [f"work{step}"], pads=[3, 3, 3, 3])
        )
        previous = f"work{step}"
    nodes.append(
        helper.make_node("Conv", [previous, "kernel"], ["logits"], strides=[stride, stride])
    )
    if output != "logits":
        nodes += [
            helper.make_node("ArgMax", ["logits"], ["best"], axis=1, keepdims=0),
            helper.make_node("Cast", ["best"], ["labels"], to=label_type),
        ]
    low = (height, width) if stride == 1 else (None, None)
    labels = helper.make_tensor_value_info("labels", label_type, [count, *low])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [count, 3, *low])
    outputs = {"labels": [labels], "logits": [logits], "both": [labels, logits]}[output]
    graph = helper.make_graph(nodes, "colour", [images], outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory, tiny_spec: Spec) -> Path:
    """A run of a narrow U-Net with random weights."""
    import torch

    from srdeploy.models import make_network
    from srdeploy.models.weights import save_weights

    folder = tmp_path_factory.mktemp("runs") / "narrow"
    spec = tiny_spec.model_copy(
        update={"input": InputPolicy(smallest=(32, 32), usual=(40, 48), largest=(64, 64))}
    )
    torch.manual_seed(0)
    network = make_network("unet", 3, width=4).eval()
    folder.mkdir()
    save_weights(network, folder / "network.safetensors")
    write_whole(folder / "config.yaml", "network:\n  name: unet\n  options: {width: 4}\n")
    write_json(folder / "spec.json", spec.model_dump(mode="json"))
    return folder


@pytest.fixture(scope="session")
def exported(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The run's exports that take photos, by form, e.g. "uint8-labels"."""
    return export_forms(run_folder, "uint8", tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="session")
def exported_float32(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Those that take what the client has normalised, e.g. "float32-labels"."""
    return export_forms(run_folder, "float32", tmp_path_factory.mktemp("exported-float32"))


def export_forms(run_folder: Path, kind: "InputKind", folder: Path) -> dict[str, Path]:
    """The run's exports in `folder` by form: both outputs are exported, the others cut from it."""
    from srdeploy.deployable import Deployable
    from srdeploy.export.to_onnx import export_onnx
    from srdeploy.runs import load_network, open_run

    run = open_run(run_folder)
    whole = folder / f"{kind}-both.onnx"
    module = Deployable(load_network(run), run.spec, kind, "both")
    export_onnx(module, run.spec, whole, input=kind, output="both")
    paths = {f"{kind}-both": whole}
    for output, other in (("labels", "logits"), ("logits", "labels")):
        model = onnx.load(str(whole))
        (cut,) = (value for value in model.graph.output if value.name == other)
        model.graph.output.remove(cut)
        paths[f"{kind}-{output}"] = folder / f"{kind}-{output}.onnx"
        onnx.save(model, str(paths[f"{kind}-{output}"]))
    return paths


@pytest.fixture(scope="session")
def with_exits(regulated_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The regulated run's graph with the exits in."""
    from srdeploy.studies.with_exits import export_with_exits

    path = tmp_path_factory.mktemp("exits") / "with-exits.onnx"
    export_with_exits(regulated_run, path)
    return path


@pytest.fixture(scope="session")
def regulated_run(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The narrow run again, with exits beside its weights."""
    import yaml

    from srdeploy.models.weights import save_weights
    from srdeploy.runs import load_network, open_run
    from srdeploy.train.regulation import SelfRegulation
    from srdeploy.train.regulation_config import RegulationConfig

    folder = tmp_path_factory.mktemp("runs") / "regulated"
    shutil.copytree(run_folder, folder)
    settings = RegulationConfig(width=8)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["regulation"] = settings.model_dump(mode="json")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    regulated = SelfRegulation(load_network(open_run(folder)), 3, settings=settings)
    assert regulated.exits is not None
    save_weights(regulated.exits, folder / "exits.safetensors")
    return folder
