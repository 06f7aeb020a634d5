"""`srdeploy strip` on what torch exported without us, and what other verbs make of the result."""

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import Tensor, nn

Verb = Callable[..., tuple[int, str, str]]


class Foreign(nn.Module):
    """Tells green, red and blue apart, with an auxiliary head as people train with one."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 3, 1, bias=False)
        self.classifier = nn.Conv2d(3, 3, 1, bias=False)
        self.aux_classifier = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 3, 1))
        with torch.no_grad():
            self.backbone.weight.copy_(torch.eye(3)[:, :, None, None])
            self.classifier.weight.copy_(torch.eye(3)[[1, 0, 2]][:, :, None, None])

    def forward(self, input: Tensor) -> dict[str, Tensor]:
        features = self.backbone(input)
        return {"out": self.classifier(features), "aux": self.aux_classifier(features)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The network as torch.onnx.export writes it, for any size and for one size."""
    folder = tmp_path_factory.mktemp("foreign")
    torch.manual_seed(0)
    network = Foreign().eval()
    size = {axis: torch.export.Dim.DYNAMIC for axis in (0, 2, 3)}
    files = {"any": folder / "any.onnx", "one": folder / "one.onnx"}
    images = {"any": torch.zeros(2, 3, 40, 56), "one": torch.zeros(1, 3, 64, 96)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        for kind, path in files.items():
            torch.onnx.export(
                network,
                (images[kind],),
                str(path),
                dynamo=True,
                verbose=False,
                input_names=["input"],
                output_names=["out", "aux"],
                dynamic_shapes=(size,) if kind == "any" else None,
            )
    return files


@pytest.fixture
def classes(tmp_path: Path, tiny_data: Path) -> Path:
    """The tiny set's classes, for a network that takes values in 0..1."""
    table = json.loads((tiny_data / "classes.json").read_text())
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({**table, "mean": [0, 0, 0], "std": [1, 1, 1]}))
    return path


def only_json(out: str) -> dict[str, Any]:
    """stdout's one line, parsed."""
    assert out.count("\n") == 1
    value = json.loads(out)
    assert isinstance(value, dict)
    return value


@pytest.mark.parametrize(("kind", "least"), [("any", 1.0), ("one", 0.8)])
def test_a_foreign_file_is_stripped_once_and_then_served_like_ours(
    srdeploy: Verb,
    exported: dict[str, Path],
    classes: Path,
    tiny_data: Path,
    tmp_path: Path,
    kind: str,
    least: float,
) -> None:
    """Graphs of one size get photos brought to it, and masks brought back."""
    photos = tiny_data / "images" / "val"
    stripped = tmp_path / "stripped.onnx"
    code, out, err = srdeploy(
        *("strip", exported[kind], "--keep", "out", "--out", stripped),
        *("--classes", classes, "--images", photos, "--json"),
    )
    found = only_json(out)
    assert (code, err) == (0, "")
    assert found["certificate"]["passed"] is True
    assert found["removed"]["outputs"] == ["aux"]
    code, out, _ = srdeploy("evaluate", stripped, tiny_data, "--json")
    assert code == 0
    assert only_json(out)["miou"] >= least
    code, _, _ = srdeploy("predict", stripped, photos, "--out", tmp_path / "masks")
    assert code == 0
    with Image.open(tmp_path / "masks" / "val_00.png") as mask:
        assert mask.size == (48, 40)
    code, out, _ = srdeploy(
        *("bench", stripped, "--budget", "1", "--no-costs", "--json"),
        *(("--size", "40x48") if kind == "any" else ()),
    )
    assert code == 0
    assert only_json(out)["cells"][0]["size"] == ([40, 48] if kind == "any" else [64, 96])


def test_without_an_output_to_keep_all_are_listed_and_one_is_suggested(
    srdeploy: Verb, exported: dict[str, Path]
) -> None:
    source = exported["any"]
    before = sorted(source.parent.iterdir())
    code, out, err = srdeploy("strip", source)
    assert code == 2
    assert "out (the main one?)" in out
    assert "251" in out  # parameters of the auxiliary head
    assert f"srdeploy strip {source} --keep out" in err
    code, out, err = srdeploy("strip", source, "--json")
    found = only_json(out)
    assert code == 2
    assert found["likely_main"] == "out"
    assert [output["name"] for output in found["outputs"]] == ["out", "aux"]
    assert found["outputs"][1]["parameters"] == 251
    assert sorted(source.parent.iterdir()) == before


def test_people_read_what_went_and_what_was_proved(
    srdeploy: Verb, exported: dict[str, Path], tmp_path: Path
) -> None:
    code, out, err = srdeploy(
        "strip", exported["any"], "--keep", "out", "--out", tmp_path / "small.onnx"
    )
    assert (code, out) == (0, "")
    assert "✓ identity: the part of any.onnx that 'out' needs" in err
    assert "✓ survivors: nothing that 'out' does not need; removed 1 output" in err
    assert "✓ parity: 'out' equal bit for bit" in err
    assert (tmp_path / "small.certificate.json").is_file()


def test_a_line_that_fails_is_exit_code_1(srdeploy: Verb, tmp_path: Path) -> None:
    """Here the original can't be run: its auxiliary output needs an operator of its own."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("Relu", ["x"], ["out"]),
            helper.make_node("Secret", ["x"], ["aux"], domain="own"),
        ],
        "two",
        [value("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [value(name, TensorProto.FLOAT, [1, 3, 8, 8]) for name in ("out", "aux")],
        [numpy_helper.from_array(np.ones(1, np.float32), "unused")],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), str(path))
    code, _, err = srdeploy("strip", path, "--keep", "out")
    assert code == 1
    assert "✗ parity: 'out' not shown to be equal" in err
    assert (tmp_path / "model.stripped.onnx").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--keep", "owt"], "did you mean 'out'?"),
        (["--keep", "out", "--out", "small.engine"], "give it that suffix"),
        (["--keep", "out", "--classes", "absent.json"], "no such file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    srdeploy: Verb, exported: dict[str, Path], arguments: list[str], words: str
) -> None:
    code, out, err = srdeploy("strip", exported["any"], *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def test_stripping_does_not_need_torch(exported: dict[str, Path], tmp_path: Path) -> None:
    arguments = ["strip", str(exported["any"]), "--keep", "out", "--out", str(tmp_path / "s.onnx")]
    code = f"""
import sys
sys.argv[1:] = {arguments!r}
from srdeploy.cli.main import app
app(standalone_mode=False)
assert "onnxruntime" in sys.modules
assert "torch" not in sys.modules, "torch was imported"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
