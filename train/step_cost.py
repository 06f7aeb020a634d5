"""What self-regulation costs while training: time and memory of one step, over the baseline's.

Time: all variants live in one process and step in turn, forth and back (A B C C B A), so that what
else the machine does falls on all of them alike. A second baseline steps among them: the ratio of
the two is what can't be told from equality. Memory: each variant trains alone in a fresh process.
"""

import gc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats

from srdeploy import console
from srdeploy.environment import describe_environment
from srdeploy.metrics import Interval
from srdeploy.models.cost import count_parameters
from srdeploy.train.config import TrainConfig
from srdeploy.train.step_variants import BASELINE, VARIANTS, Trainee, memory_of
from srdeploy.validation import Settings

Floats = npt.NDArray[np.float64]

TWIN = "baseline again"
"""Key of the second baseline's times."""

WARM_UP_LEAST = 3
WARM_UP_MOST = 12
"""Rounds after which warming up is given up."""
SETTLED = 1.1
"""Warm when a variant's last two steps differ by less than this factor."""


class VariantCost(Settings):
    """One variant's step."""

    name: str
    """A key of VARIANTS."""
    description: str
    parameters_added: int
    """Of the exits, in training alone."""
    median_ms: float
    """Of all steps."""
    time: Interval | None
    """Ratio to the baseline's; None for the baseline itself."""
    settled: bool
    """Whether its times became steady while warming up."""
    memory_mib: float
    """Peak in training. CPU: resident memory above what the process held before the network was
    built. CUDA: of torch's allocator."""
    memory_ratio: float
    """Of memory_mib to the baseline's."""
    process_mib: float | None
    """Peak of the whole process's resident memory, torch itself included; None on CUDA."""
    rounds_ms: tuple[tuple[float, ...], ...]
    """Both steps of every round, in the order measured."""


class StepCost(Settings):
    """What one step costs in each variant; the first is the baseline."""

    network: str
    options: dict[str, Any]
    parameters: int
    """Of the plain network."""
    classes: int
    size: tuple[int, int]
    """(height, width) of the images."""
    batch: int
    rounds: int
    """Every variant stepped twice in each."""
    device: str
    """As torch names it, with the GPU's own name where there is one."""
    arithmetic: str
    """Of forward and backward, as `srdeploy train` chooses it for the device."""
    layout: str
    """Of activations in memory: NCHW or NHWC."""
    threads: int
    """CPU threads of torch."""
    compiled: bool = False
    """Whether all variants, the baseline too, stepped through torch.compile."""
    variants: tuple[VariantCost, ...]
    floor: Interval
    """Ratio of the second baseline's times to the first's: smaller differences are noise."""
    environment: dict[str, str]


def step_cost(config: TrainConfig, classes: int, rounds: int, threads: int | None) -> StepCost:
    """Measures all variants of the training `config`; see this module's docstring.

    threads: of torch on the CPU; None: torch's default. Raises UserError where the network can't
    be built or trained at this size, and where memory does not suffice.
    """
    memory = {
        name: memory_of(name, config, classes, threads)
        for name in console.track(VARIANTS, "memory, each in a fresh process")
    }
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        trainees = {name: Trainee(name, config, classes) for name in VARIANTS}
        trainees[TWIN] = Trainee(BASELINE, config, classes)
        settled = warm_up([one.step for one in trainees.values()])
        found = time_steps([one.step for one in trainees.values()], rounds)
        used = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    times = dict(zip(trainees, found, strict=True))
    device, plain = trainees[BASELINE].device, count_parameters(trainees[BASELINE].regulated)
    rows = tuple(
        VariantCost(
            name=name,
            description=variant.description,
            parameters_added=count_parameters(trainees[name].regulated) - plain,
            median_ms=float(np.median(times[name])),
            time=None if name == BASELINE else paired_ratio(times[name], times[BASELINE]),
            settled=steady,
            memory_mib=memory[name].own,
            memory_ratio=memory[name].own / memory[BASELINE].own,
            process_mib=memory[name].process,
            rounds_ms=tuple((float(first), float(second)) for first, second in times[name]),
        )
        for (name, variant), steady in zip(VARIANTS.items(), settled, strict=False)
    )
    on_gpu = device.type == "cuda"
    return StepCost(
        network=config.network.name,
        options=config.network.options,
        parameters=plain,
        classes=classes,
        size=config.crop,
        batch=config.batch,
        rounds=rounds,
        device=f"{device}, {torch.cuda.get_device_name(device)}" if on_gpu else "cpu",
        arithmetic="bfloat16 autocast" if config.autocast(device.type) else "float32",
        layout="NHWC" if config.channels_last else "NCHW",
        threads=used,
        compiled=config.compile,
        variants=rows,
        floor=paired_ratio(times[TWIN], times[BASELINE]),
        environment=describe_environment(),
    )


def warm_up(steps: Sequence[Callable[[], float]]) -> list[bool]:
    """Steps all in turn until each one's times (ms) have been steady; which of them were."""
    times: list[list[float]] = [[] for _ in steps]
    settled = [False] * len(steps)
    for number in console.track(range(1, WARM_UP_MOST + 1), "warming up"):
        for index, step in enumerate(steps):
            times[index].append(step())
            if number >= WARM_UP_LEAST:
                last = times[index][-2:]
                settled[index] = settled[index] or max(last) < SETTLED * min(last)
        if all(settled):
            break
    return settled


def time_steps(steps: Sequence[Callable[[], float]], rounds: int) -> Floats:
    """Milliseconds [steps, rounds, 2]: all forth and back in each round, which begins with another
    one each time."""
    count = len(steps)
    times = np.zeros((count, rounds, 2))
    gc.collect()
    gc.disable()  # a collection would hit one of them at random
    try:
        for number in console.track(range(rounds), "training steps", rounds):
            forth = [(number + place) % count for place in range(count)]
            for half, order in enumerate((forth, forth[::-1])):
                for index in order:
                    times[index, number, half] = steps[index]()
    finally:
        gc.enable()
    return times


def paired_ratio(times: Floats, baseline: Floats) -> Interval:
    """Ratio of medians over rounds, of times [rounds, 2] each, with its 95 % interval.

    The bootstrap draws whole rounds, of both together: what slowed both in a round stays together.
    """
    pairs = times.mean(axis=1), baseline.mean(axis=1)
    found = stats.bootstrap(
        pairs,
        _ratio_of_medians,
        paired=True,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    value = float(_ratio_of_medians(*pairs))
    return Interval(value=value, low=float(found.low), high=float(found.high))


def _ratio_of_medians(times: Floats, baseline: Floats, axis: int = -1) -> Floats:
    return np.asarray(np.median(times, axis=axis) / np.median(baseline, axis=axis), np.float64)
