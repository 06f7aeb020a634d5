"""The stacked hourglass: its recursion against a loop, its merging, its supervised scores."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional

from srdeploy.errors import UserError
from srdeploy.models.hourglass import Hourglass, Pool, StackedHourglass


def hourglass_by_loop(module: Hourglass, features: Tensor) -> Tensor:
    """Down and up level by level, without recursion or torch's pooling and resizing."""
    levels: list[Hourglass] = []
    inner: nn.Module = module
    while isinstance(inner, Hourglass):
        levels.append(inner)
        inner = inner.inner
    skips = []
    for level in levels:
        skips.append(level.skip(features))
        odd = (0, features.shape[3] % 2, 0, features.shape[2] % 2)
        padded = functional.pad(features, odd, value=float("-inf"))
        n, c, h, w = padded.shape
        features = level.down(padded.reshape(n, c, h // 2, 2, w // 2, 2).amax((3, 5)))
    features = inner(features)
    for level, skip in zip(reversed(levels), reversed(skips), strict=True):
        doubled = level.up(features).repeat_interleave(2, 2).repeat_interleave(2, 3)
        features = skip + doubled[..., : skip.shape[2], : skip.shape[3]]
    return features


def randomised(module: nn.Module) -> nn.Module:
    """In evaluation mode and float64, with statistics that normalise."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None
            assert part.running_var is not None
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 2)
    return module.double().eval()


@settings(max_examples=8, deadline=None)
@given(height=st.integers(1, 21), width=st.integers(1, 21), seed=st.integers(0, 2**16))
def test_the_recursion_equals_a_loop_at_any_size(height: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    module = randomised(Hourglass(4))
    assert isinstance(module, Hourglass)
    features = torch.randn(2, 4, height, width, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(module(features), hourglass_by_loop(module, features))


@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 9), width=st.integers(1, 9))
def test_pooling_equals_torchs_in_ceil_mode_and_its_gradient(height: int, width: int) -> None:
    ours = torch.randn(2, 3, height, width, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    pooled, expected = Pool()(ours), functional.max_pool2d(theirs, 2, ceil_mode=True)
    assert torch.equal(pooled, expected)
    weights = torch.randn_like(expected)
    (pooled * weights).sum().backward()
    (expected * weights).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)


def test_poolings_in_a_row_are_traced_for_sizes_that_vary() -> None:
    axes = {2: Dim("H", min=32, max=2**15), 3: Dim("W", min=32, max=2**15)}
    pools = nn.Sequential(*(Pool() for _ in range(4)))
    program = torch.export.export(pools, (torch.zeros(1, 2, 64, 96),), dynamic_shapes=(axes,))
    assert program.module()(torch.zeros(1, 2, 33, 70)).shape == (1, 2, 3, 5)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 700))
def test_nearest_to_the_exact_size_is_doubling_and_cutting(size: int) -> None:
    row = torch.arange(-(-size // 2), dtype=torch.float32)[None, None, None]
    raised = functional.interpolate(row, size=(1, size), mode="nearest")
    assert torch.equal(raised, row.repeat_interleave(2, 3)[..., :size])


def test_every_stack_reads_the_input_before_it_its_features_and_its_logits() -> None:
    torch.manual_seed(0)
    network = StackedHourglass(3, stacks=3, width=8).eval()
    merges = list(zip(network.merge_features, network.merge_scores, strict=True))
    images = torch.randn(2, 3, 45, 52)
    with torch.inference_mode():
        given = network.stem(images)
        for index, (stack, score) in enumerate(zip(network.stacks, network.scores, strict=True)):
            features = stack(given)
            logits = score(features)
            if index < 2:
                given = given + merges[index][0](features) + merges[index][1](logits)
        expected = functional.interpolate(logits, (45, 52), mode="bilinear")
        torch.testing.assert_close(network(images), expected)


def test_all_scores_but_the_last_are_own_exits_of_full_weight_at_a_quarter_of_the_size() -> None:
    network = StackedHourglass(3, stacks=3, width=8).eval()
    assert network.auxiliary_heads == {"scores.0": 1.0, "scores.1": 1.0}
    seen: list[Tensor] = []
    for name in network.auxiliary_heads:
        network.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output: seen.append(output)
        )
    with torch.inference_mode():
        network(torch.randn(2, 3, 64, 100))
    assert [tuple(logits.shape) for logits in seen] == [(2, 3, 16, 25)] * 2


def test_one_stack_has_no_exit_of_its_own() -> None:
    network = StackedHourglass(3, stacks=1, width=8)
    assert network.auxiliary_heads == {}
    assert network.stages == ("stem", "stacks.0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stacks": 0}, "stacks is 0: a whole number from 1"),
        ({"stacks": True}, "stacks is True"),
        ({"width": 6}, "width is 6: a multiple of 4"),
        ({"width": 0}, "width is 0"),
        ({"width": "wide"}, "width is 'wide'"),
    ],
)
def test_options_that_can_not_be_built_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        StackedHourglass(3, **options)
