"""How a model's sessions are laid out, and what each layout gave when it was tried."""

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


class Layout(Settings):
    """Sessions side by side, and the CPU threads of each."""

    sessions: int = Field(ge=1)
    threads: int | None = Field(default=None, ge=1)
    """None: the runtime's own choice."""


class Measured(Settings):
    """One layout tried on images of the model's usual size."""

    layout: Layout
    batch: int
    images_per_s: float
    """With all sessions busy."""
    alone_ms: float | None
    """Of a run while the other sessions rest; None for batches of several images."""


class Plan(Settings):
    """What serves a model."""

    lone: Layout | None
    """One session for requests that are alone in the process; None: the shared ones do that."""
    shared: Layout
    """For requests that have company."""
    batch: int = Field(ge=1)
    """Images in one run, at most."""
    max_wait_ms: float = Field(ge=0)
    """How long a run waits for images that are being decoded, where it could hold more."""
    measured: tuple[Measured, ...] = ()
    """Empty where the layout was given."""

    def __str__(self) -> str:
        text = _sessions(self.shared)
        if self.batch > 1:
            text += f", up to {self.batch} images a run"
        if self.lone is not None:
            text += f"; {_sessions(self.lone)} for a lone request"
        return text


def _sessions(layout: Layout) -> str:
    many = "" if layout.sessions == 1 else "s"
    if layout.threads is None:
        return f"{layout.sessions} session{many}"
    return f"{layout.sessions} session{many} of {layout.threads} thread" + "s" * (
        layout.threads > 1
    )


# A model's source, and the open sessions of a layout.


@dataclass(frozen=True)
class Source:
    """Where a served model comes from; it is opened again at each reload."""

    name: str
    path: Path
    device: str = "cpu"
    runtime: str = "auto"
    spec: Spec | None = None
    """For ONNX files that carry none."""
    precision: str | None = None

    def runtime_of(self, threads: int | None) -> Runtime:
        """A runtime that is not open yet. Raises UserError as open_runtime."""
        return open_runtime(
            self.path, self.device, self.runtime, self.spec, threads, self.precision
        )


@contextmanager
def open_sessions(
    source: Source, layout: Layout, wrap: Callable[[Runtime], Runtime] | None = None
) -> Iterator[list[Runtime]]:
    """The layout's runtimes, open. wrap: puts each into another. Raises UserError as open_runtime.

    Each has the weights in its own memory: threads that run one session of onnxruntime at once keep
    taking each other's buffers out of the caches, which cost 4 % where it was measured.
    """
    with ExitStack() as stack:
        runtimes = [source.runtime_of(layout.threads) for _ in range(layout.sessions)]
        if wrap is not None:
            runtimes = [wrap(runtime) for runtime in runtimes]
        yield [stack.enter_context(runtime) for runtime in runtimes]


# Tries layouts of sessions on the model and device at hand, and chooses.

TRY_S = 0.3
"""How long each layout is tried, and at least `LEAST_RUNS` in each session."""
LEAST_RUNS = 2
PASSES = 3
"""Over all layouts, forth and back: the machine's speed drifts. The best of each layout counts, for
what else ran meanwhile only ever made it slower."""
WORTH = 1.03
"""Another layout or a larger batch must be so many times as fast: less is noise."""
WORTH_ALONE = 1.15
"""A session for lone requests must be so many times as fast as one of the shared: it holds the
weights once more."""
MAX_BATCH = 8
"""Images in one run, at most, unless a flag says otherwise."""
MAX_WAIT_MS = 2.0


@dataclass(frozen=True)
class Wishes:
    """What the user fixed; None is measured."""

    sessions: int | None = None
    threads: int | None = None
    max_batch: int | None = None
    max_wait_ms: float = MAX_WAIT_MS


def make_plan(source: Source, cores: int, wishes: Wishes) -> Plan:
    """Measures what the wishes leave open. Raises UserError where the model can't be run."""
    probe = source.runtime_of(None)
    batches = _batches(probe, wishes)
    layouts = _layouts(probe, cores, wishes)
    if len(layouts) == 1 and len(batches) == 1:
        return Plan(lone=None, shared=layouts[0], batch=batches[0], max_wait_ms=wishes.max_wait_ms)
    tried: dict[tuple[Layout, int], list[Measured]] = {}
    for number in range(PASSES):
        for layout in reversed(layouts) if number % 2 else layouts:
            with open_sessions(source, layout) as runtimes:
                for measured in _try_layout(runtimes, layout, batches):
                    tried.setdefault((layout, measured.batch), []).append(measured)
    return choose([_best(passes) for passes in tried.values()], wishes.max_wait_ms)


def choose(measured: Sequence[Measured], max_wait_ms: float) -> Plan:
    """The plan of the highest throughput, with a session for lone requests where that pays.

    Where the throughput is equal: the smaller batch; on a CPU the more sessions, since decoding and
    encoding go on beside a run of one thread, and on a GPU the fewer.
    """
    ordered = sorted(measured, key=_simplest_first)
    best = ordered[0]
    for one in ordered[1:]:
        if one.images_per_s > WORTH * best.images_per_s:
            best = one
    alone = {one.layout: one.alone_ms for one in measured if one.alone_ms is not None}
    lone = None
    if alone:
        quickest = min(alone, key=lambda layout: alone[layout])
        usual = alone.get(best.layout)
        if usual is not None and usual > WORTH_ALONE * alone[quickest]:
            lone = quickest.model_copy(update={"sessions": 1})
    return Plan(
        lone=lone,
        shared=best.layout,
        batch=best.batch,
        max_wait_ms=max_wait_ms,
        measured=tuple(measured),
    )


def usual_images(runtime: Runtime, batch: int) -> Pixels:
    """Noise of the model's usual size, uint8 [N, H, W, 3], for trials and warm-up."""
    count, height, width, _ = runtime.input_shape
    usual = runtime.spec.input.usual
    shape = (count or batch, height or usual[0], width or usual[1], 3)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def _batches(runtime: Runtime, wishes: Wishes) -> list[int]:
    """Batch sizes to try: powers of two."""
    if runtime.input_shape[0] is not None:
        return [1]  # the graph fixes N: every request brings its own N images
    most = wishes.max_batch or MAX_BATCH
    sizes = [1]
    while sizes[-1] * 2 <= most:
        sizes.append(sizes[-1] * 2)
    # On CPUs the largest tells as much as all of them.
    return sizes if parse_device(runtime.device)[0] == "cuda" else sorted({1, sizes[-1]})


def _layouts(runtime: Runtime, cores: int, wishes: Wishes) -> list[Layout]:
    if wishes.sessions is not None:
        threads = wishes.threads
        if threads is None and parse_device(runtime.device)[0] == "cpu":
            threads = max(1, cores // wishes.sessions)
        return [Layout(sessions=wishes.sessions, threads=threads)]
    if parse_device(runtime.device)[0] == "cuda":
        return [Layout(sessions=count, threads=wishes.threads) for count in (1, 2)]
    if runtime.backend == "torch":  # its threads are the process's, not a session's
        return [Layout(sessions=1, threads=wishes.threads or cores)]
    if wishes.threads is not None:
        return [Layout(sessions=max(1, cores // wishes.threads), threads=wishes.threads)]
    counts = sorted({1, 2, max(1, cores // 2), cores} & set(range(1, cores + 1)))
    return [Layout(sessions=count, threads=max(1, cores // count)) for count in counts]


def _simplest_first(one: Measured) -> tuple[int, int]:
    sessions = one.layout.sessions
    return one.batch, sessions if one.layout.threads is None else -sessions


def _try_layout(
    runtimes: Sequence[Runtime], layout: Layout, batches: Sequence[int]
) -> list[Measured]:
    """One figure for each batch size that the model takes."""
    found = []
    for batch in batches:
        images = usual_images(runtimes[0], batch)
        try:
            runtimes[0].run(images)
        except ImageShapeError:
            if batch == batches[0]:
                raise
            break  # out of memory, or beyond the engine's profiles: larger ones would be, too
        alone = _run_for(runtimes[:1], images)[1] if batch == 1 else None
        rate = _run_for(runtimes, images)[0]
        found.append(Measured(layout=layout, batch=batch, images_per_s=rate, alone_ms=alone))
    return found


def _run_for(runtimes: Sequence[Runtime], images: Pixels) -> tuple[float, float]:
    """(images per second of all sessions together, milliseconds of the quickest run)."""
    times: list[list[float]] = [[] for _ in runtimes]
    faults: list[BaseException] = []
    threads = [
        Thread(target=_run_one, args=(runtime, images, own, faults))
        for runtime, own in zip(runtimes, times, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]
    rate = sum(len(own) * len(images) / sum(own) for own in times)
    return rate, 1000 * min(one for own in times for one in own)


def _run_one(
    runtime: Runtime, images: Pixels, times: list[float], faults: list[BaseException]
) -> None:
    try:
        runtime.run(images)  # threads do not start at once
        began = time.perf_counter()
        while len(times) < LEAST_RUNS or time.perf_counter() - began < TRY_S:
            before = time.perf_counter()
            runtime.run(images)
            times.append(time.perf_counter() - before)
    except UserError as error:
        faults.append(error)


def _best(passes: Sequence[Measured]) -> Measured:
    alone = [one.alone_ms for one in passes if one.alone_ms is not None]
    return passes[0].model_copy(
        update={
            "images_per_s": max(one.images_per_s for one in passes),
            "alone_ms": min(alone) if alone else None,
        }
    )
