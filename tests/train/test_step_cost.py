"""The cost of a training step: how it is timed, what the variants train, and their memory."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from srdeploy.errors import UserError
from srdeploy.train import step_cost
from srdeploy.train.config import TrainConfig
from srdeploy.train.optimize import accumulate_gradient
from srdeploy.train.step_cost import (
    VARIANTS,
    WARM_UP_MOST,
    Trainee,
    memory_of,
    paired_ratio,
    time_steps,
    training_of,
    warm_up,
)

SMALL: dict[str, Any] = {
    "network": "unet",
    "options": {"width": 2},
    "classes": 3,
    "size": (32, 48),
    "batch": 2,
    "device": "cpu",
}
MIB_OF_WEIGHTS = 64

OWN_CODE = f"""
import os

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3, 2, 1)
        self.head = nn.Conv2d(4, classes, 1)

    def forward(self, images):
        logits = self.head(self.body(images))
        return nn.functional.interpolate(logits, images.shape[2:])


class Heavy(Net):
    def __init__(self, classes):
        super().__init__(classes)
        self.weight = nn.Parameter(torch.zeros({MIB_OF_WEIGHTS}, 2**18))

    def forward(self, images):
        return super().forward(images) + self.weight.mean()


class Detached(Net):
    def forward(self, images):
        with torch.no_grad():
            return super().forward(images)


class Fussy(Net):
    def forward(self, images):
        if self.training and len(images) > 1:
            raise ValueError("one image at a time")
        return super().forward(images)


def killed(classes):
    os.kill(os.getpid(), 9)
"""


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder holds a user's module step_nets."""
    (tmp_path / "step_nets.py").write_text(OWN_CODE)
    monkeypatch.chdir(tmp_path)


def small(**changes: Any) -> TrainConfig:
    return training_of(**{**SMALL, **changes})


def test_steps_go_forth_and_back_twice_a_round_and_every_variant_begins_once() -> None:
    calls: list[int] = []

    def step(index: int) -> Callable[[], float]:
        def run() -> float:
            assert not gc.isenabled()
            calls.append(index)
            return float(len(calls))

        return run

    times = time_steps([step(index) for index in range(3)], 3)
    rounds = [calls[start : start + 6] for start in (0, 6, 12)]
    assert all(one == one[::-1] and sorted(one) == [0, 0, 1, 1, 2, 2] for one in rounds)
    assert [one[0] for one in rounds] == [0, 1, 2]
    assert times[:, 0].tolist() == [[1, 6], [2, 5], [3, 4]]
    assert gc.isenabled()


def test_the_collector_is_on_again_after_a_step_that_failed() -> None:
    def fails() -> float:
        raise UserError("out of memory")

    with pytest.raises(UserError):
        time_steps([fails], 3)
    assert gc.isenabled()


def test_warming_up_goes_on_until_every_variant_has_been_steady() -> None:
    slow_start = iter([900.0, 500, 300, 200, 100, 105, 300, 300])
    steady = iter([50.0, 50, 50, 50, 50, 50, 50])
    assert warm_up([lambda: next(slow_start), lambda: next(steady)]) == [True, True]
    assert next(slow_start) == 300  # six rounds: 100 and 105 are near enough
    assert next(steady) == 50


def test_times_that_never_become_steady_are_told() -> None:
    doubling = iter(2.0**power for power in range(WARM_UP_MOST))
    assert warm_up([lambda: next(doubling), lambda: 1.0]) == [False, True]
    assert list(doubling) == []


def test_a_machine_that_slows_down_for_all_leaves_the_ratio_alone() -> None:
    drift = np.linspace(1, 5, 12)[:, None]
    noise = np.random.default_rng(0).normal(1, 0.01, (2, 12, 2))
    found = paired_ratio(1.5 * drift * noise[0], drift * noise[1])
    assert found.low < 1.5 < found.high
    assert found.high - found.low < 0.1
    rng = np.random.default_rng(1)
    shuffled = rng.permutation(1.5 * drift * noise[0])
    unpaired = paired_ratio(shuffled, drift * noise[1])
    assert unpaired.high - unpaired.low > 5 * (found.high - found.low)


def test_variants_start_alike_and_differ_in_exits_and_feedback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terms: list[set[str]] = []

    def recorded(*arguments: Any) -> dict[str, Any]:
        found = accumulate_gradient(*arguments)
        terms.append(set(found) - {"total", "own"})
        return found

    monkeypatch.setattr(step_cost, "accumulate_gradient", recorded)
    config = small()
    trainees = {name: Trainee(name, config, 3) for name in VARIANTS}
    first = trainees["baseline"]
    before = {key: value.clone() for key, value in first.regulated.network.state_dict().items()}
    for one in trainees.values():
        state = one.regulated.network.state_dict()
        assert all(torch.equal(state[key], value) for key, value in before.items())
        assert torch.equal(one.batch.images, first.batch.images)
        assert torch.equal(one.batch.labels, first.batch.labels)
        assert one.step() > 0
    exits = {"main", "seg", "cls"}
    assert terms == [{"main"}, exits, exits | {"srf", "srl"}, exits | {"srf", "srl"}]
    after = first.regulated.network.state_dict()
    assert not all(torch.equal(after[key], value) for key, value in before.items())


def test_steps_are_those_of_srdeploy_train_by_default() -> None:
    config = small()
    plain = TrainConfig(data=Path())
    changed = {"network", "crop", "batch", "lr", "device"}
    assert config.model_dump(exclude=changed) == plain.model_dump(exclude=changed)
    assert (config.autocast("cpu"), config.autocast("cuda")) == (False, True)
    assert config.model_copy(update={"amp": True}).autocast("cpu")
    assert not config.model_copy(update={"amp": False}).autocast("cuda")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"network": "u-net"}, "unknown network 'u-net': did you mean 'unet'?"),
        ({"options": {"widht": 2}}, "no option 'widht': did you mean 'width'?"),
        ({"options": {"classes": 2}}, "leave it away"),
        ({"size": (16, 64)}, "--size 16x64: too small"),
        ({"batch": 1}, "--batch 1: BatchNorm"),
        ({"device": "gpu"}, "gpu"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(
    changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError) as refused:
        small(**changes)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nmore"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_memory_that_does_not_suffice_is_said_in_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise error

    trainee = Trainee("baseline", small(), 3)
    monkeypatch.setattr(step_cost, "accumulate_gradient", fails)
    with pytest.raises(UserError, match="batch 2 of 32x48: give a smaller --batch or --size"):
        trainee.step()


@pytest.mark.usefixtures("own_code")
@pytest.mark.parametrize(
    ("name", "reason"), [("Detached", "does not require grad"), ("Fussy", "one image at a time")]
)
def test_a_network_of_ones_own_that_cannot_be_trained_is_named(name: str, reason: str) -> None:
    trainee = Trainee("baseline", small(network=f"step_nets:{name}", options={}), 3)
    with pytest.raises(UserError, match=f"'step_nets:{name}': a step .* failed .*{reason}"):
        trainee.step()


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("a shape that is wrong")

    trainee = Trainee("baseline", small(), 3)
    monkeypatch.setattr(step_cost, "accumulate_gradient", fails)
    with pytest.raises(RuntimeError, match="a shape that is wrong"):
        trainee.step()


@pytest.mark.usefixtures("own_code")
def test_memory_is_the_trainings_own_and_not_what_measures_it() -> None:
    held = np.ones(2**27)  # 1 GiB here must not count there
    found = memory_of("baseline", small(network="step_nets:Heavy", options={}), 3, 1)
    # Weights, gradients and momentum.
    assert 3 * MIB_OF_WEIGHTS <= found.own < 5 * MIB_OF_WEIGHTS
    assert found.process is not None
    assert found.own < found.process < held.nbytes / 2**20


@pytest.mark.usefixtures("own_code")
def test_a_process_that_the_system_ends_is_told() -> None:
    with pytest.raises(UserError, match="'baseline' was ended from outside.*smaller --batch"):
        memory_of("baseline", small(network="step_nets:killed", options={}), 3, 1)
