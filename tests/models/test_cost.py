"""Counting what networks cost: against sums by hand, and against torch's counter on real values."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from srdeploy.models import make_network
from srdeploy.models.cost import ShapesAlone, count_macs, count_macs_by_module, count_parameters

SMALL: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "small_networks.json").read_text()
)


class Attention(nn.Module):
    """[1, 8, h, w] -> the same, every pixel looking at all."""

    def forward(self, features: Tensor) -> Tensor:
        pixels = features.flatten(2)
        weights = (pixels.transpose(1, 2) @ pixels).softmax(-1)
        return (pixels @ weights).reshape(features.shape)


class Deciding(nn.Module):
    """A forward that the meta device can't run: it asks for a value, and has a tensor aside."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, padding=1)
        self.aside = torch.ones(1)

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.convolution(images * self.aside)
        return output if output.mean().item() < 1e9 else self.convolution(output)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Conv2d(8, 6, 3, padding=1), 10 * 12 * 6 * 8 * 9),
        (nn.Conv2d(8, 6, 3, stride=2), 4 * 5 * 6 * 8 * 9),
        (nn.Conv2d(8, 8, 3, padding=1, groups=4), 10 * 12 * 8 * 2 * 9),
        (nn.ConvTranspose2d(8, 4, 2, stride=2), 10 * 12 * 8 * 4 * 4),
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)), 8 * 5),
        (Attention(), 2 * 8 * (10 * 12) ** 2),
        (nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)), 0),
    ],
    ids=["3x3", "strided", "grouped", "transposed", "linear", "matrix products", "no products"],
)
def test_products_are_counted_as_by_hand_and_nothing_else(module: nn.Module, expected: int) -> None:
    assert count_macs(module, (10, 12), channels=8) == expected


@pytest.mark.parametrize("name", ["unet", "hourglass", "spgnet-resnet50", "ocrnet-hrnet-w18"])
def test_counts_without_values_equal_torchs_counter_on_values(name: str) -> None:
    network = make_network(name, 5, **SMALL[name]).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, 65, 70))
    assert 2 * count_macs(network, (65, 70)) == counter.get_total_flops()


def test_the_parts_counts_make_up_the_whole() -> None:
    macs = count_macs_by_module(make_network("unet", 5, width=4), (64, 64))
    levels = [count for name, count in macs.items() if name.startswith(("encoder.", "decoder."))]
    tops = [
        count
        for name, count in macs.items()
        if name in ("encoder", "decoder") or name.count(".") == 1
    ]
    assert len(levels) > len(tops)
    assert sum(tops) + macs["classifier"] == macs[""]


def test_a_forward_that_needs_values_is_counted_on_the_real_device() -> None:
    assert count_macs(Deciding(), (10, 12)) == 10 * 12 * 4 * 3 * 9


def test_a_size_that_does_not_fit_raises_the_forwards_own_error() -> None:
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        count_macs(nn.Conv2d(3, 4, 9), (4, 4))


def test_counting_leaves_everything_as_it_was() -> None:
    network = make_network("hourglass", 5, width=8).train()
    network.get_submodule("stem").eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [part.training for part in network.modules()]
    random = torch.get_rng_state()
    count_macs(network, (64, 64))
    assert [part.training for part in network.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in network.modules())


def test_parameters_are_counted_once_frozen_ones_too_and_buffers_never() -> None:
    shared = nn.Conv2d(2, 2, 1)
    frozen = nn.BatchNorm2d(2).requires_grad_(False)
    assert count_parameters(nn.Sequential(shared, frozen, shared)) == (2 * 2 + 2) + (2 + 2)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.just(4), st.integers(1, 9), st.integers(1, 9)),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_shapes_alone_are_those_of_the_operators(
    shape: tuple[int, int, int, int], size: tuple[int, int], dtype: torch.dtype
) -> None:
    def results(features: Tensor) -> list[Tensor]:
        mean = torch.zeros(4, dtype=dtype, device=features.device)
        return [
            functional.batch_norm(features, mean, mean + 1),
            functional.relu(features),
            features + features,
            features + features[:1, :, :1],
            features + mean.float()[:, None, None],
            features + 1.5,
            functional.interpolate(features, size=size, mode="bilinear", align_corners=False),
            functional.interpolate(features, size=size, mode="nearest"),
        ]

    expected = results(torch.zeros(shape, dtype=dtype))
    with ShapesAlone():  # type: ignore[no-untyped-call]
        found = results(torch.empty(shape, dtype=dtype, device="meta"))
    assert [(one.shape, one.dtype) for one in found] == [(one.shape, one.dtype) for one in expected]


def test_tensors_with_values_are_computed_among_shapes_alone() -> None:
    values = torch.randn(1, 4, 3, 3)
    with ShapesAlone():  # type: ignore[no-untyped-call]
        found = functional.relu(values) + values
    assert torch.equal(found, values.clamp(min=0) + values)
