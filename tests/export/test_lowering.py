"""Decompositions done in place write what torch's own write."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import srdeploy.export.lowering as lowering
import srdeploy.export.to_onnx as exporter
from srdeploy.deployable import Deployable
from srdeploy.export.lowering import lower
from srdeploy.export.to_onnx import export_onnx
from srdeploy.spec import Spec


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


@pytest.mark.parametrize("module", [EveryRewrite(), MixesTypes()], ids=["one type", "mixed"])
def test_types_are_brought_together_where_they_differ_and_only_there(
    tmp_path: Path, spec: Spec, module: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    promoted: list[object] = []
    promote = lowering._promote

    def record(graph: torch.fx.GraphModule) -> None:
        promoted.append(graph)
        promote(graph)

    monkeypatch.setattr(lowering, "_promote", record)
    deployable = Deployable(module, spec, output="logits")
    export_onnx(deployable, spec, tmp_path / "quick.onnx", output="logits")
    assert bool(promoted) == isinstance(module, MixesTypes)
    monkeypatch.setattr(exporter, "lowered_in_place", nullcontext)
    export_onnx(deployable, spec, tmp_path / "slow.onnx", output="logits")
    assert (tmp_path / "quick.onnx").read_bytes() == (tmp_path / "slow.onnx").read_bytes()
