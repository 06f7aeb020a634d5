"""Plans a model's sessions: how many, with how many threads, and how many images in one run.

Session layouts are tried on the model and device at hand, and the fastest is chosen.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import numpy as np
from pydantic import Field

from srdeploy.errors import UserError
from srdeploy.imaging import Pixels
from srdeploy.runtimes.base import ImageShapeError, Runtime, parse_device
from srdeploy.runtimes.registry import open_runtime
from srdeploy.spec import Spec
from srdeploy.validation import Settings

TRIAL_S = 0.3
"""How long each layout is tried, and for at least MIN_RUNS in each session."""
MIN_RUNS = 2
PASSES = 3
"""Passes over all layouts, back and forth: the machine's speed drifts. Each layout's best pass
counts, since other load only ever slows a pass down."""
MIN_SPEEDUP = 1.03
"""How much faster more sessions or a larger batch must be to be chosen: less is noise."""
MIN_LATENCY_SPEEDUP = 1.15
"""How much faster than a shared session a latency session must be: it holds the weights again."""
MAX_BATCH = 8
"""Most images in one run, unless the user sets another limit."""
MAX_WAIT_MS = 2.0


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from. It is opened for each session, and again at each reload."""

    name: str
    path: Path
    device: str = "cpu"
    runtime: str = "auto"
    spec: Spec | None = None
    """For ONNX files that carry none."""
    precision: str | None = None

    def make_runtime(self, threads: int | None) -> Runtime:
        """A runtime that is not open yet. Raises UserError like open_runtime."""
        return open_runtime(
            self.path, self.device, self.runtime, self.spec, threads, self.precision
        )


class SessionLayout(Settings):
    """Parallel sessions, and the CPU threads of each."""

    sessions: int = Field(ge=1)
    threads: int | None = Field(default=None, ge=1)
    """None: the runtime's own choice."""

    def __str__(self) -> str:
        text = f"{self.sessions} session{'s' * (self.sessions > 1)}"
        if self.threads is None:
            return text
        return f"{text} of {self.threads} thread{'s' * (self.threads > 1)}"


class LayoutTrial(Settings):
    """The measured speed of one layout, on images of the model's usual size."""

    layout: SessionLayout
    batch: int
    images_per_s: float
    """Throughput with all sessions busy."""
    latency_ms: float | None = Field(serialization_alias="alone_ms")
    """Duration of a run while the other sessions are idle; None for batches of several images."""


class SessionPlan(Settings):
    """The sessions of one model, and how they batch."""

    latency: SessionLayout | None = Field(default=None, serialization_alias="lone")
    """One session for a request that is alone in the process; None: the shared ones serve it."""
    shared: SessionLayout
    """The sessions for concurrent requests."""
    batch: int = Field(ge=1)
    """Most images in one run."""
    max_wait_ms: float = Field(ge=0)
    """How long a run that could hold more images waits for those that are being decoded."""
    measured: tuple[LayoutTrial, ...] = ()
    """Empty if the layout was given."""

    def __str__(self) -> str:
        text = str(self.shared)
        if self.batch > 1:
            text += f", up to {self.batch} images a run"
        if self.latency is not None:
            text += f"; {self.latency} for low latency"
        return text


@dataclass(frozen=True)
class PlanConstraints:
    """What the user fixed; None is measured."""

    sessions: int | None = None
    threads: int | None = None
    max_batch: int | None = None
    max_wait_ms: float = MAX_WAIT_MS


@contextmanager
def open_sessions(
    source: ModelSource,
    layout: SessionLayout,
    wrap: Callable[[Runtime], Runtime] | None = None,
) -> Iterator[list[Runtime]]:
    """The layout's runtimes, open. wrap: applied to each before it is opened. Raises UserError like
    open_runtime.

    Each session holds the weights in its own memory. Threads that share one onnxruntime session
    evict each other's buffers from the caches, which cost 4 % when measured.
    """
    with ExitStack() as stack:
        runtimes = [source.make_runtime(layout.threads) for _ in range(layout.sessions)]
        if wrap is not None:
            runtimes = [wrap(runtime) for runtime in runtimes]
        yield [stack.enter_context(runtime) for runtime in runtimes]


def synthetic_images(runtime: Runtime, batch: int) -> Pixels:
    """Noise of the model's usual size, uint8 [N, H, W, 3], for trials and warm-up."""
    count, height, width, _ = runtime.input_shape
    usual = runtime.spec.input.usual
    shape = (count or batch, height or usual[0], width or usual[1], 3)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def make_plan(source: ModelSource, cores: int, constraints: PlanConstraints) -> SessionPlan:
    """Measures what the constraints leave open. Raises UserError if the model can't be run."""
    probe = source.make_runtime(None)
    batches = _candidate_batches(probe, constraints)
    layouts = _candidate_layouts(probe, cores, constraints)
    if len(layouts) == 1 and len(batches) == 1:
        return SessionPlan(shared=layouts[0], batch=batches[0], max_wait_ms=constraints.max_wait_ms)
    trials: dict[tuple[SessionLayout, int], list[LayoutTrial]] = {}
    for number in range(PASSES):
        for layout in reversed(layouts) if number % 2 else layouts:
            with open_sessions(source, layout) as runtimes:
                for trial in _try_layout(runtimes, layout, batches):
                    trials.setdefault((layout, trial.batch), []).append(trial)
    return choose_plan([_best_pass(passes) for passes in trials.values()], constraints.max_wait_ms)


def choose_plan(trials: Sequence[LayoutTrial], max_wait_ms: float) -> SessionPlan:
    """The plan with the highest throughput, with a latency session if that pays.

    At equal throughput it takes the smaller batch; on a CPU more sessions, since decoding and
    encoding then run next to single-threaded runs, and on a GPU fewer.
    """
    ordered = sorted(trials, key=_preference)
    best = ordered[0]
    for trial in ordered[1:]:
        if trial.images_per_s > MIN_SPEEDUP * best.images_per_s:
            best = trial
    latencies = {trial.layout: trial.latency_ms for trial in trials if trial.latency_ms is not None}
    latency = None
    if latencies:
        quickest = min(latencies, key=lambda layout: latencies[layout])
        shared_ms = latencies.get(best.layout)
        if shared_ms is not None and shared_ms > MIN_LATENCY_SPEEDUP * latencies[quickest]:
            latency = quickest.model_copy(update={"sessions": 1})
    return SessionPlan(
        latency=latency,
        shared=best.layout,
        batch=best.batch,
        max_wait_ms=max_wait_ms,
        measured=tuple(trials),
    )


def _candidate_batches(runtime: Runtime, constraints: PlanConstraints) -> list[int]:
    """Powers of two."""
    if runtime.input_shape[0] is not None:
        return [1]  # the graph fixes N: every request brings its own N images
    most = constraints.max_batch or MAX_BATCH
    sizes = [1]
    while sizes[-1] * 2 <= most:
        sizes.append(sizes[-1] * 2)
    # On CPUs the largest size tells as much as all of them.
    return sizes if parse_device(runtime.device)[0] == "cuda" else sorted({1, sizes[-1]})


def _candidate_layouts(
    runtime: Runtime, cores: int, constraints: PlanConstraints
) -> list[SessionLayout]:
    sessions, threads = constraints.sessions, constraints.threads
    device = parse_device(runtime.device)[0]
    if sessions is not None:
        if threads is None and device == "cpu":
            threads = max(1, cores // sessions)
        return [SessionLayout(sessions=sessions, threads=threads)]
    if device == "cuda":
        return [SessionLayout(sessions=count, threads=threads) for count in (1, 2)]
    if runtime.backend == "torch":  # its threads belong to the process, not to a session
        return [SessionLayout(sessions=1, threads=threads or cores)]
    if threads is not None:
        return [SessionLayout(sessions=max(1, cores // threads), threads=threads)]
    counts = sorted({1, 2, max(1, cores // 2), cores} & set(range(1, cores + 1)))
    return [SessionLayout(sessions=count, threads=max(1, cores // count)) for count in counts]


def _preference(trial: LayoutTrial) -> tuple[int, int]:
    """Sort key, the preferred trial first."""
    sessions = trial.layout.sessions
    return trial.batch, sessions if trial.layout.threads is None else -sessions


def _try_layout(
    runtimes: Sequence[Runtime], layout: SessionLayout, batches: Sequence[int]
) -> list[LayoutTrial]:
    """One trial for each batch size that the model takes."""
    trials = []
    for batch in batches:
        images = synthetic_images(runtimes[0], batch)
        try:
            runtimes[0].run(images)
        except ImageShapeError:
            if batch == batches[0]:
                raise
            break  # out of memory, or beyond the engine's profiles: larger batches would be, too
        latency_ms = _run_for(runtimes[:1], images)[1] if batch == 1 else None
        rate = _run_for(runtimes, images)[0]
        trials.append(
            LayoutTrial(layout=layout, batch=batch, images_per_s=rate, latency_ms=latency_ms)
        )
    return trials


def _run_for(runtimes: Sequence[Runtime], images: Pixels) -> tuple[float, float]:
    """(images per second of all sessions together, milliseconds of the fastest run)."""
    times: list[list[float]] = [[] for _ in runtimes]
    errors: list[BaseException] = []
    threads = [
        Thread(target=_run_session, args=(runtime, images, own, errors))
        for runtime, own in zip(runtimes, times, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    rate = sum(len(own) * len(images) / sum(own) for own in times)
    return rate, 1000 * min(seconds for own in times for seconds in own)


def _run_session(
    runtime: Runtime, images: Pixels, times: list[float], errors: list[BaseException]
) -> None:
    try:
        runtime.run(images)  # threads do not start at the same moment
        began = time.perf_counter()
        while len(times) < MIN_RUNS or time.perf_counter() - began < TRIAL_S:
            before = time.perf_counter()
            runtime.run(images)
            times.append(time.perf_counter() - before)
    except UserError as error:
        errors.append(error)


def _best_pass(passes: Sequence[LayoutTrial]) -> LayoutTrial:
    latencies = [trial.latency_ms for trial in passes if trial.latency_ms is not None]
    return passes[0].model_copy(
        update={
            "images_per_s": max(trial.images_per_s for trial in passes),
            "latency_ms": min(latencies) if latencies else None,
        }
    )
