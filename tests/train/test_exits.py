"""Exits and the hooks that feed them."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from srdeploy.errors import UserError
from srdeploy.train.exits import (
    AuthorsExit,
    Exits,
    LeanExit,
    collected,
    feature_map,
    given_taps,
    make_exits,
)
from srdeploy.train.regulation_config import RegulationConfig


def small_network() -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU()),
            body=nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU()),
            drop=nn.Dropout(0.5),
            head=nn.Conv2d(6, 3, 1),
        )
    )


class Interpreted(torch.fx.Interpreter):
    """Runs a traced network and keeps each module's output: what hooks collect, without hooks."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(torch.fx.symbolic_trace(network))
        self.outputs: dict[str, Tensor] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        self.outputs[str(target)] = super().call_module(target, args, kwargs)
        return self.outputs[str(target)]


def test_hooks_collect_what_a_traced_run_computes() -> None:
    network = small_network().eval()
    images = torch.randn(2, 3, 40, 56)
    traced = Interpreted(network)
    traced.run(images)
    names = ["stem.0", "stem.2", "body.1", "head"]
    with collected(network, names) as outputs:
        network(images)
    for name in names:
        # The hooked modules' values; ReLUs here are not in place, so that both keep them.
        torch.testing.assert_close(feature_map(outputs, name), traced.outputs[name])


def hook_count(network: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in network.modules())


def test_no_hook_stays_after_a_forward_or_an_exception() -> None:
    network = small_network()
    with collected(network, ["stem", "body"]):
        assert hook_count(network) == 2
        network(torch.zeros(2, 3, 32, 32))
    assert hook_count(network) == 0
    with pytest.raises(RuntimeError), collected(network, ["stem", "body"]):
        network(torch.zeros(2, 7, 32, 32))
    assert hook_count(network) == 0


def test_no_hook_stays_when_one_of_the_names_is_wrong() -> None:
    network = small_network()
    with pytest.raises(AttributeError), collected(network, ["stem", "nope"]):
        pass
    assert hook_count(network) == 0


class Shared(nn.Module):
    """One convolution that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.idle = nn.Conv2d(3, 3, 1)
        self.pool = nn.MaxPool2d(2, return_indices=True)
        self.flat = nn.Flatten()

    def forward(self, images: Tensor) -> Tensor:
        first: Tensor = self.conv(images)
        self.flat(first)
        self.pool(first)
        second: Tensor = self.conv(first)
        return second


def test_a_module_that_runs_twice_gives_its_last_output() -> None:
    network = Shared()
    with collected(network, ["conv"]) as outputs:
        result = network(torch.randn(1, 3, 8, 8))
    assert outputs["conv"] is result


def test_a_module_counts_as_running_when_it_ran_last() -> None:
    network = Shared()
    with collected(network, ["conv", "pool"]) as outputs:
        network(torch.randn(1, 3, 8, 8))
    assert list(outputs) == ["pool", "conv"]


def test_a_tap_with_several_outputs_gives_its_first() -> None:
    network = Shared()
    with collected(network, ["pool"]) as outputs:
        network(torch.randn(1, 3, 8, 8))
    assert feature_map(outputs, "pool").shape == (1, 3, 4, 4)


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        ("idle", "tap 'idle' did not run"),
        (
            "flat",
            r"tap 'flat' gives Tensor of shape \(2, 12288\) for 64x64 images: exits read maps",
        ),
    ],
)
def test_a_tap_without_a_feature_map_is_refused_by_name(tap: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        given_taps(Shared(), [tap], (64, 64))


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        (["stm"], "Sequential has no module 'stm' to tap: did you mean 'stem'"),
        (["transformer"], "no module 'transformer' to tap: known: stem, body, drop, head"),
        (["stem", "stem"], "taps must differ"),
        ([], "taps is empty"),
        ("stem", "taps is 'stem': give \"auto\" or a list"),
    ],
)
def test_wrong_taps_are_refused_with_the_names_to_choose_from(
    taps: str | list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        given_taps(small_network(), taps)


def test_taps_against_the_order_of_running_are_refused() -> None:
    with pytest.raises(UserError, match="shallow to deep: stem, body"):
        given_taps(small_network(), ["body", "stem"])


def test_the_probe_finds_channels_and_strides_and_changes_nothing() -> None:
    network = small_network().train()
    network.get_submodule("stem.1").eval()  # a frozen part must stay frozen
    before = {key: value.clone() for key, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    random = torch.get_rng_state()
    maps = given_taps(network, ["stem", "body"]).maps
    assert [(one.channels, one.stride) for one in maps] == [(4, 2), (6, 4)]
    assert [module.training for module in network.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]), key


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 2, 4, 8]))
def test_a_lean_exit_takes_any_size_and_averages_whole_windows(
    height: int, width: int, window: int
) -> None:
    exit_ = LeanExit(3, 5, width=4, window=window).eval()
    seen: list[Tensor] = []
    exit_.reduce.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    features = torch.randn(1, 3, height, width)
    logits, class_logits, hidden = exit_(features)
    rows, columns = -(-height // window), -(-width // window)
    assert logits.shape == (1, 5, rows, columns)
    assert class_logits.shape == (1, 5)
    assert hidden.shape == (1, 4, rows, columns)
    last = features[0, :, (rows - 1) * window :, (columns - 1) * window :]
    torch.testing.assert_close(seen[0][0, :, -1, -1], last.mean((1, 2)))


def test_lean_exits_pool_to_the_least_stride_and_leave_coarser_taps() -> None:
    exits = Exits([4, 4, 4, 4], [1, 3, 8, 32], 3, RegulationConfig(min_stride=8))
    windows = [one.window for one in exits.taps if isinstance(one, LeanExit)]
    assert windows == [8, 3, 1, 1]


def test_the_authors_head_is_two_3x3_to_256_at_the_taps_size() -> None:
    head = AuthorsExit(7, 21)
    kernels = [m.weight.shape for m in head.modules() if isinstance(m, nn.Conv2d)]
    assert kernels == [(256, 7, 3, 3), (256, 256, 3, 3), (21, 256, 1, 1)]
    assert head.classifier.weight.shape == (21, 21)
    logits, class_logits, hidden = head.eval()(torch.randn(1, 7, 9, 5))
    assert logits.shape == (1, 21, 9, 5)
    assert hidden.shape == (1, 256, 9, 5)
    torch.testing.assert_close(class_logits, head.classifier(logits.mean((2, 3))))


def test_exits_on_deeplabs_stages_have_the_designed_size() -> None:
    # 5 classifiers and 4 segmenters; conv1, res2, res3, res4 of a ResNet-101.
    lean = make_exits([64, 256, 512, 1024], [2, 4, 8, 8], 21, RegulationConfig(), torch.empty(0))
    count = sum(parameter.numel() for parameter in lean.parameters())
    reduce = (64 + 256 + 512 + 1024) * 64
    each = 64 * 64 * 9 + 2 * (2 * 64) + 2 * (64 * 21 + 21)
    assert count == reduce + 4 * each + 21 * 21 + 21


def test_making_exits_leaves_the_random_state() -> None:
    random = torch.get_rng_state()
    make_exits([4], [2], 3, RegulationConfig(), torch.empty(0))
    assert torch.equal(torch.get_rng_state(), random)


def test_exits_take_the_networks_dtype() -> None:
    exits = make_exits([4], [2], 3, RegulationConfig(), torch.empty(0, dtype=torch.bfloat16))
    assert {parameter.dtype for parameter in exits.parameters()} == {torch.bfloat16}
