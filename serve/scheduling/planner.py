"""Tries layouts of sessions on the model and device at hand, and chooses.

On a GPU batches win; on CPUs they often lose, and sessions of one thread side by side beat one
session with all threads, except for a request that is alone.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Thread

import numpy as np

from srdeploy.errors import UserError
from srdeploy.imaging import Pixels
from srdeploy.serve.runtime import ImageShapeError, Runtime, parse_device
from srdeploy.serve.scheduling.plan import Layout, Measured, Plan
from srdeploy.serve.scheduling.sessions import Source, open_sessions

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
