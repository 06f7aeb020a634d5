"""What one forward shows of a network's modules."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from srdeploy.errors import UserError
from srdeploy.models import make_network
from srdeploy.models.tracing import PROBE_SIZE, FeatureMap, token_grid, trace, trace_maps

K = 5


class Tokens(nn.Module):
    """Patches of 16 pixels and leading tokens; a block over [N, L, C], one over [N, H, W, C], one
    over [L, N, C]."""

    def __init__(self, patch: int = 16, leading: int = 1) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, patch, patch)
        self.leading = nn.Parameter(torch.zeros(1, leading, 8))
        self.rows = nn.Linear(8, 8)
        self.across = nn.Linear(8, 8)
        self.cells = nn.LayerNorm(8)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Conv2d(8, K, 1)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images)
        tokens = torch.cat((self.leading.expand(len(images), -1, -1), self._flat(patches)), 1)
        tokens = self.across(self.rows(tokens).transpose(0, 1)).transpose(0, 1)
        cells = tokens[:, self.leading.shape[1] :].unflatten(1, patches.shape[2:])
        cells = self.cells(cells).permute(0, 3, 1, 2)
        logits: Tensor = self.head(cells + self.pool(cells))
        return logits

    @staticmethod
    def _flat(patches: Tensor) -> Tensor:
        return patches.flatten(2).transpose(1, 2)


def by_name(maps: tuple[FeatureMap, ...]) -> dict[str, FeatureMap]:
    return {one.name: one for one in maps}


def test_layouts_grids_and_leading_tokens_are_told_apart() -> None:
    maps = by_name(trace_maps(Tokens(leading=5)))
    assert list(maps) == ["patches", "rows", "cells", "pool", "head"]  # [L, N, C] is no map
    assert maps["patches"] == FeatureMap("patches", "Conv2d", "NCHW", 8, (4, 6), 16, 0)
    assert maps["rows"] == FeatureMap("rows", "Linear", "NLC", 8, (4, 6), 16, 5)
    assert maps["cells"] == FeatureMap("cells", "LayerNorm", "NHWC", 8, (4, 6), 16, 0)
    assert maps["pool"].grid == (1, 1)


@pytest.mark.parametrize(
    ("patch", "grid"), [(12, (5, 8)), (14, (4, 6)), (32, (2, 3)), (4, (16, 24))]
)
def test_tokens_of_any_patch_size_are_laid_out(patch: int, grid: tuple[int, int]) -> None:
    rows = by_name(trace_maps(Tokens(patch)))["rows"]
    assert (rows.layout, rows.grid, rows.skipped) == ("NLC", grid, 1)


ROWS: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "small_networks.json").read_text()
)


@pytest.mark.parametrize(
    ("name", "strides"),
    [
        ("deeplabv2-resnet18", [2, 4, 8, 16]),
        ("segnet", [1, 2, 4, 8, 16]),
        ("unet", [1, 2, 4, 8, 16]),
        ("spgnet-resnet50", [4, 8, 16, 32] * 2),
    ],
)
def test_strides_are_powers_of_two_also_where_padding_adds_a_cell(
    name: str, strides: list[int]
) -> None:
    network = make_network(name, K, **ROWS[name])
    stages: Any = network.stages
    for size in (PROBE_SIZE, (65, 97), (128, 96)):
        maps = by_name(trace_maps(network, size))
        assert [maps[stage].stride for stage in stages] == strides


class Odd(nn.Module):
    """A module that runs twice, one that is overwritten in place, one that raises nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Conv2d(3, K, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.norm(self.twice(self.twice(images))))
        if torch.rand(()) > 2:
            raise AssertionError
        if self.training:
            self.norm.running_mean = None
        logits: Tensor = self.head(self.drop(x))
        return logits


def test_modules_that_run_twice_are_no_maps_and_overwritten_ones_are_marked() -> None:
    found = trace(Odd())
    assert "twice" not in found.maps
    assert found.visits["twice"].calls == 2
    modified = [name for name, visit in found.visits.items() if visit.modified]
    assert modified == ["norm"]
    assert found.logits == (2, K, *PROBE_SIZE)


def test_nothing_of_the_network_changes() -> None:
    network = Odd().train()
    network.norm.eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    random = torch.get_rng_state()
    trace_maps(network)
    assert [module.training for module in network.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(not module._forward_hooks for module in network.modules())
    assert all(parameter.grad is None for parameter in network.parameters())
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]), key


class InTraining(nn.Module):
    """A head that only training runs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Conv2d(4, K, 1)
        self.aux = nn.Conv2d(4, K, 1)

    def forward(self, images: Tensor) -> Any:
        features = self.body(images)
        logits = self.head(features)
        return (logits, self.aux(features)) if self.training else logits


def test_a_training_trace_runs_training_heads_and_leaves_statistics_alone() -> None:
    network = InTraining()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    assert "aux" not in trace(network).visits
    assert "aux" in trace(network, training=True).visits
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_a_network_on_the_meta_device_is_traced_without_values() -> None:
    with torch.device("meta"):
        network = make_network("unet", K, width=4)
    assert by_name(trace_maps(network))["encoder.4"].grid == (4, 6)


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, K, 1)
        self.position = nn.Parameter(torch.zeros(1, K, 32, 48))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(images) + self.position
        return logits


def test_a_size_that_the_network_refuses_is_named_with_its_own_reason_and_the_remedy() -> None:
    with pytest.raises(UserError, match=r"64x96, .*size of tensor a.*probe_size=\(H, W\)"):
        trace_maps(Fixed())
    assert trace(Fixed(), (32, 48)).logits == (2, K, 32, 48)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_torchscript_module_is_refused() -> None:
    scripted = torch.jit.trace(nn.Conv2d(3, K, 1), torch.zeros(1, 3, 32, 32))
    with pytest.raises(UserError, match="TorchScript"):
        trace(nn.Sequential(scripted))


@settings(max_examples=200, deadline=None)
@given(
    st.integers(32, 600),
    st.integers(32, 600),
    st.sampled_from([4, 8, 14, 16, 32]),
    st.booleans(),
)
def test_tokens_find_their_grid_at_any_size(height: int, width: int, stride: int, up: bool) -> None:
    added = stride - 1 if up else 0
    grid = ((height + added) // stride, (width + added) // stride)
    assert token_grid(grid[0] * grid[1], (height, width), stride) == grid
