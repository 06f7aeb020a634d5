"""One variant of a training, ready to step: the baseline, and ways to regulate it.

A step is that of `srdeploy train`, on one synthetic batch that stays in memory: reading and varying
photos, validation and checkpoints are the same for all variants, and left out.
"""

import gc
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import psutil
import torch
from scipy import stats
from torch import nn

from srdeploy import console
from srdeploy.deployable import Normalise
from srdeploy.environment import describe_environment
from srdeploy.errors import UserError
from srdeploy.metrics import Interval
from srdeploy.models.cost import count_parameters
from srdeploy.models.imported import is_imported
from srdeploy.models.tracing import PROBE_SIZE
from srdeploy.runs import NetworkConfig, build_network
from srdeploy.spec import Spec
from srdeploy.train.compiled import Compiled, require_compiler
from srdeploy.train.config import TrainConfig
from srdeploy.train.device import find_device
from srdeploy.train.loader import Batch
from srdeploy.train.optimize import StepModel, accumulate_gradient, make_optimizer
from srdeploy.train.regulation import SelfRegulation
from srdeploy.train.regulation_config import RegulationConfig
from srdeploy.train.start import place
from srdeploy.validation import Settings, validated


class Variant(NamedTuple):
    """One way to train the network."""

    description: str
    """A description in plain words."""
    regulation: RegulationConfig
    progress: float
    """Share of the training that is done, which decides whether feedback acts: 0..1."""


VARIANTS = {
    "baseline": Variant("the plain network", RegulationConfig(enabled=False), 1.0),
    "mea": Variant("lean exits learn from the labels, before feedback", RegulationConfig(), 0.0),
    "lean": Variant("lean exits, with feedback: srdeploy's defaults", RegulationConfig(), 1.0),
    "authors": Variant("the authors' heads, with feedback", RegulationConfig.authors(), 1.0),
}
BASELINE = "baseline"

SMALLEST = 32
"""Pixels of an image's side from which on networks are trained."""
LEARNING_RATE = 1e-4
"""Small: the same batch again and again must not drive the weights to infinity."""
STEPS_FOR_MEMORY = 3
"""The optimizer's buffers appear in the first step; the next ones hold them beside activations."""


def training_of(
    network: str,
    options: Mapping[str, Any],
    classes: int,
    size: tuple[int, int],
    batch: int,
    device: str,
    compile_steps: bool = False,
) -> TrainConfig:
    """The configuration of `srdeploy train` whose steps are measured, with its defaults for the
    rest; size is (height, width). Raises UserError, also for a device that is not there, and where
    steps are to be compiled and can't be."""
    height, width = size
    if min(size) < SMALLEST:
        raise UserError(
            f"--size {height}x{width}: too small, networks are trained on images from "
            f"{SMALLEST}x{SMALLEST} on"
        )
    if batch < 2:
        raise UserError(f"--batch {batch}: BatchNorm can't be trained on one image, give 2 or more")
    chosen = validated(NetworkConfig, {"name": network, "options": dict(options)}, "--option")
    if not is_imported(network):
        # Costs nothing, and refuses an unknown name or option before anything is measured.
        with torch.device("meta"):
            build_network(chosen, classes)
    found = find_device(device)
    if compile_steps:
        require_compiler(found, processes=1)
    values = {
        "data": Path(),  # nothing is read
        "network": chosen,
        "crop": size,
        "batch": batch,
        "lr": LEARNING_RATE,
        "device": str(found),
        "compile": compile_steps,
    }
    return validated(TrainConfig, values, "the training")


class Trainee:
    """One variant, ready to take training steps on a synthetic batch. Raises UserError."""

    def __init__(self, name: str, config: TrainConfig, classes: int) -> None:
        _, settings, self.progress = VARIANTS[name]
        self.config = config
        self.device = torch.device(config.device)
        with explained(config):
            # All variants start from the same network, and see the same batch.
            torch.manual_seed(config.seed)
            network = build_network(config.network, classes, config.crop)
            self.regulated = _regulate(network, classes, settings, config.crop)
            place(self.regulated, self.device, config.channels_last)
            names = tuple(f"class {index}" for index in range(classes))
            spec = Spec(classes=names, palette=((0, 0, 0),) * classes)
            normalise = Normalise(spec).to(self.device)
            amp = config.autocast(self.device.type)
            self.model = StepModel(self.regulated, normalise, amp, config.channels_last)
        if config.compile:
            # For as long as the trainee lives: it is never validated or saved.
            self.regulated.compiled = Compiled(self.regulated)
        self.optimizer = make_optimizer(self.regulated, config)
        rng = np.random.default_rng(config.seed)
        shape = (config.batch, *config.crop)
        images = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        labels = rng.integers(0, classes, shape, dtype=np.uint8)
        self.batch = Batch(torch.from_numpy(images), torch.from_numpy(labels), position=0)

    def step(self) -> float:
        """One training step; its time in milliseconds, waiting for the device."""
        self._wait()
        start = time.perf_counter()
        with explained(self.config):
            self.optimizer.zero_grad(set_to_none=True)
            accumulate_gradient(self.model, [self.batch], [1.0], self.progress)
            self.optimizer.step()
            self._wait()
        return 1000 * (time.perf_counter() - start)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextmanager
def explained(config: TrainConfig) -> Iterator[None]:
    """Memory that does not suffice, and failures of a user's own network, as UserError."""
    height, width = config.crop
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a user's network may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in reason:
            raise UserError(
                f"out of memory on {config.device} with batch {config.batch} of {height}x{width}: "
                "give a smaller --batch or --size"
            ) from error
        if not is_imported(config.network.name):
            raise
        raise UserError(
            f"network '{config.network.name}': a step of training failed ({reason}): see that its "
            "loss.backward() works in training mode at this --batch and --size"
        ) from error


def _regulate(
    network: nn.Module, classes: int, settings: RegulationConfig, size: tuple[int, int]
) -> SelfRegulation:
    """The network with the exits of `settings`; size: (H, W) of the images it will be given."""
    try:
        return SelfRegulation(network, classes, settings=settings, probe_size=PROBE_SIZE)
    except UserError:
        # Some networks take only images of one size. What else is wrong fails again.
        return SelfRegulation(network, classes, settings=settings, probe_size=size)


class Memory(NamedTuple):
    """Peak memory in MiB; see VariantCost."""

    own: float
    process: float | None


def memory_of(name: str, config: TrainConfig, classes: int, threads: int | None) -> Memory:
    """Peak memory of a variant's training, in a fresh process. Raises UserError."""
    # One process per call: what an earlier variant left behind would count as this one's.
    context = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_end_quietly) as pool:
        try:
            return pool.submit(measure_memory, name, config, classes, threads).result()
        except BrokenProcessPool as error:
            height, width = config.crop
            raise UserError(
                f"the process that trained '{name}' was ended from outside, which systems do when "
                f"memory runs out (batch {config.batch} of {height}x{width}): give a smaller "
                "--batch or --size"
            ) from error


def measure_memory(name: str, config: TrainConfig, classes: int, threads: int | None) -> Memory:
    """Trains a variant for some steps in this process, which must have trained nothing before."""
    if threads is not None:
        torch.set_num_threads(threads)
    device = torch.device(config.device)
    _first_step_of_all(device)
    before = psutil.Process().memory_info().rss / 2**20
    trainee = Trainee(name, config, classes)
    for _ in range(STEPS_FOR_MEMORY):
        trainee.step()
    if device.type == "cuda":
        return Memory(torch.cuda.max_memory_allocated(device) / 2**20, None)
    peak = _peak_resident_mib()
    return Memory(peak - before, peak)


def _end_quietly() -> None:
    """On Ctrl-C, of which the process that waits for this one tells people."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _first_step_of_all(device: torch.device) -> None:
    """A tiny step: what torch imports and sets up in its first one belongs to no variant."""
    tiny = nn.Conv2d(3, 1, 3, device=device)
    optimizer = torch.optim.SGD(tiny.parameters(), lr=LEARNING_RATE, momentum=0.9)
    tiny(torch.zeros(1, 3, 8, 8, device=device)).sum().backward()
    optimizer.step()


def _peak_resident_mib() -> float:
    """The peak resident memory of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage's, which on Linux starts at what the starting process held.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS tells bytes, others KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# The cost of self-regulation: time and memory of one step, relative to the baseline

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
    """Parameters of the exits, which exist only in training."""
    median_ms: float
    """The median of all steps."""
    time: Interval | None
    """Ratio to the baseline's; None for the baseline itself."""
    settled: bool
    """True if the step times became steady during the warm-up."""
    memory_mib: float
    """Peak in training. CPU: resident memory above what the process held before the network was
    built. CUDA: of torch's allocator."""
    memory_ratio: float
    """The ratio of memory_mib to the baseline's."""
    process_mib: float | None
    """Peak of the whole process's resident memory, torch itself included; None on CUDA."""
    rounds_ms: tuple[tuple[float, ...], ...]
    """Both steps of every round, in the order measured."""


class StepCost(Settings):
    """The cost of one step in each variant; the first is the baseline."""

    network: str
    options: dict[str, Any]
    parameters: int
    """The parameter count of the plain network."""
    classes: int
    size: tuple[int, int]
    """(height, width) of the images."""
    batch: int
    rounds: int
    """Every variant stepped twice in each."""
    device: str
    """The device as torch names it, with the name of the GPU if there is one."""
    arithmetic: str
    """The precision of forward and backward, as `srdeploy train` chooses it for the device."""
    layout: str
    """The layout of activations in memory: NCHW or NHWC."""
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
