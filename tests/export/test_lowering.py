"""Decompositions done in place write what torch's own write."""

import inspect
import json
import logging
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.onnx._internal.exporter import _fx_passes

import srdeploy.export.lowering as lowering
import srdeploy.export.to_onnx as exporter
from srdeploy.deployable import Deployable
from srdeploy.export.lowering import lower
from srdeploy.export.to_onnx import export_onnx
from srdeploy.models import make_network
from srdeploy.spec import Spec

REPOSITORY = Path(__file__).parents[2]
SMALL: dict[str, dict[str, Any]] = json.loads(
    (REPOSITORY / "tests" / "small_networks.json").read_text()
)
checked = pytest.mark.skipif(
    not lowering.is_checked(), reason="this torch is not in lowering.CHECKED: it is left alone"
)


class EveryRewrite(nn.Module):
    """Calls each operator that is rewritten, and needs a size that torch asserts something about:
    that the logits are not of the images' size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.plain_norm = nn.BatchNorm2d(4, affine=False)
        self.up = nn.ConvTranspose2d(4, 4, 2, 2)
        self.up_more = nn.ConvTranspose2d(4, 4, 3, 2, 1, output_padding=1, groups=2, bias=False)
        self.drop, self.drop_channels = nn.Dropout(0.3), nn.Dropout2d(0.3)
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        features = self.drop(self.plain_norm(self.norm(self.stem(images))))
        relu = features.relu()
        chosen = (features > relu) & (relu > features) | (relu > features * features)
        features = torch.where(chosen, features, relu).to(torch.float32)
        pooled = nn.functional.max_pool2d(features, 2)
        features = features + nn.functional.interpolate(pooled, size=features.shape[2:])
        features = self.up(self.drop_channels(features)) + self.up_more(features)
        logits: Tensor = self.head(features)
        return logits


def traced(module: nn.Module) -> ExportedProgram:
    return torch.export.export(module.eval(), (torch.randn(2, 3, 16, 24),))


def targets_of(program: ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes]


def test_the_pinned_torch_is_one_that_was_checked() -> None:
    """Or else every export takes longer, and nobody would notice."""
    pins = (REPOSITORY / "constraints.txt").read_text()
    (pinned,) = re.findall(r"^torch==(.+)$", pins, re.MULTILINE)
    assert pinned in lowering.CHECKED
    if torch.__version__.partition("+")[0] == pinned:
        assert lowering.digest_of_torch() == lowering.CHECKED[pinned]


@checked
def test_a_graph_lowered_in_place_has_the_bytes_of_torchs_decomposition(
    tmp_path: Path, spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module = Deployable(EveryRewrite(), spec, output="both")
    with monkeypatch.context() as patch:
        patch.setattr(lowering, "_decompose", None)  # calling it would fail
        export_onnx(module, spec, tmp_path / "quick.onnx", output="both")
    monkeypatch.setattr(exporter, "lowered_in_place", nullcontext)
    export_onnx(module, spec, tmp_path / "slow.onnx", output="both")
    assert (tmp_path / "quick.onnx").read_bytes() == (tmp_path / "slow.onnx").read_bytes()


@checked
@pytest.mark.parametrize("name", ["deeplabv2-resnet18", "unet"])
def test_a_network_has_the_same_bytes_either_way(
    tmp_path: Path, spec: Spec, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the built-ins only OCRNet has not: it flattens axes."""
    torch.manual_seed(0)
    module = Deployable(make_network(name, len(spec.classes), **SMALL[name]), spec)
    with monkeypatch.context() as patch:
        patch.setattr(lowering, "_decompose", None)  # calling it would fail
        export_onnx(module, spec, tmp_path / "quick.onnx")
    monkeypatch.setattr(lowering, "CHECKED", {})
    export_onnx(module, spec, tmp_path / "slow.onnx")
    assert (tmp_path / "quick.onnx").read_bytes() == (tmp_path / "slow.onnx").read_bytes()


def test_a_lowered_program_computes_the_same() -> None:
    module = EveryRewrite()
    program = traced(module)
    assert lower(program)
    images = torch.randn(2, 3, 16, 24)
    torch.testing.assert_close(program.module()(images), module(images), rtol=0, atol=0)
    assert not any("batch_norm.default" in t or "dropout" in t for t in targets_of(program))


@pytest.mark.parametrize(
    "layer",
    [nn.GELU(), nn.ReLU(inplace=True), nn.BatchNorm2d(3, track_running_stats=False)],
    ids=["unknown operator", "changes its input", "batch statistics"],
)
def test_a_program_that_needs_more_is_left_to_torch_as_it_was(layer: nn.Module) -> None:
    program = traced(nn.Sequential(nn.BatchNorm2d(3), layer))
    before = targets_of(program)
    assert not lower(program)
    assert targets_of(program) == before


def test_the_last_node_keeps_the_name_that_the_program_promises() -> None:
    program = traced(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    assert not lower(program)  # its result is the output: another node can't take its place
    program = traced(nn.Sequential(nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 3, 2, 2)))
    assert lower(program)
    last = program.graph.find_nodes(op="output")[0].args[0][0]
    assert program.graph_signature.user_outputs == (last.name,)


class MixesTypes(nn.Module):
    """Compares with a whole number and adds a size: torch makes tensors of one type of them."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.where(images > 1, images, images + images.shape[2])


@checked
@pytest.mark.parametrize("module", [EveryRewrite(), MixesTypes()], ids=["one type", "mixed"])
def test_types_are_brought_together_where_they_differ_and_only_there(
    tmp_path: Path, spec: Spec, module: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    promoted: list[object] = []
    promote = _fx_passes.insert_type_promotion_nodes

    def record(graph: torch.fx.GraphModule) -> None:
        promoted.append(graph)
        promote(graph)

    monkeypatch.setattr(_fx_passes, "insert_type_promotion_nodes", record)
    deployable = Deployable(module, spec, output="logits")
    export_onnx(deployable, spec, tmp_path / "quick.onnx", output="logits")
    assert bool(promoted) == isinstance(module, MixesTypes)
    monkeypatch.setattr(exporter, "lowered_in_place", nullcontext)
    export_onnx(deployable, spec, tmp_path / "slow.onnx", output="logits")
    assert (tmp_path / "quick.onnx").read_bytes() == (tmp_path / "slow.onnx").read_bytes()


def unknown_version(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch, "__version__", "99.0.0")
    # Its modules may be gone: a look at them would fail.
    patch.setitem(sys.modules, "torch.onnx._internal.exporter._decomp", None)
    patch.setitem(sys.modules, "torch.onnx._internal.fx.passes.type_promotion", None)


def other_code(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lowering, "CHECKED", {torch.__version__.partition("+")[0]: "0" * 64})


def no_source(patch: pytest.MonkeyPatch) -> None:
    def fail(_code: object) -> str:
        raise OSError("could not get source code")

    patch.setattr(inspect, "getsource", fail)


@pytest.mark.parametrize("change", [unknown_version, other_code, no_source])
def test_a_torch_that_was_not_checked_is_left_alone(
    change: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ExportedProgram.run_decompositions, _fx_passes.insert_type_promotion_nodes
    with monkeypatch.context() as patch:
        change(patch)
        with lowering.lowered_in_place():
            during = ExportedProgram.run_decompositions, _fx_passes.insert_type_promotion_nodes
    assert during == own


def test_an_unknown_torch_exports_by_its_public_way_and_says_nothing(
    tmp_path: Path,
    spec: Spec,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    torch.manual_seed(0)
    module = Deployable(EveryRewrite(), spec)
    export_onnx(module, spec, tmp_path / "as it is.onnx")
    unknown_version(monkeypatch)
    monkeypatch.setattr(lowering, "lower", None)  # calling it would fail
    caplog.clear()
    capfd.readouterr()
    export_onnx(module, spec, tmp_path / "unknown.onnx")
    assert (tmp_path / "unknown.onnx").read_bytes() == (tmp_path / "as it is.onnx").read_bytes()
    assert [line for line in caplog.records if line.levelno >= logging.WARNING] == []
    assert capfd.readouterr() == ("", "")
