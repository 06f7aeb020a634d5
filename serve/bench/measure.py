"""Latency of artifacts against each other, measured so that only their difference shows.

Every block runs all artifacts forth and back (A B B A), so that a machine that slows down or
speeds up steadily treats them alike, and each block starts with another artifact. A second session
of the first artifact runs among them: the ratio of the two is what can't be told from equality.
"""

import gc
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from srdeploy import console
from srdeploy.imaging import Pixels, fit
from srdeploy.metrics import percent
from srdeploy.serve.artifact import open_artifact
from srdeploy.serve.evaluate import check_same_classes, evaluate
from srdeploy.serve.runtime import Runtime, open_runtime
from srdeploy.spec import Spec
from srdeploy.validation import Settings

if TYPE_CHECKING:
    from rich.table import Table

    from srdeploy.data import DataSet

Times = npt.NDArray[np.float64]

WARM_UP_LEAST = 6
WARM_UP_MOST = 40
"""Runs of one artifact after which warming up is given up."""
SETTLED = 0.05
"""Warm when the medians of the last three runs and of the three before differ by less."""
RESAMPLES = 2000


class Ratio(Settings):
    """A ratio of medians with its 95 % interval: bootstrap over blocks, paired."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Latency(Settings):
    """One artifact's wall times per run (of the whole batch), in milliseconds."""

    name: str
    path: str
    backend: str
    device: str
    precision: str
    median_ms: float
    p90_ms: float
    p99_ms: float
    ratio: Ratio | None
    """To the first artifact; None for the first itself."""
    settled: bool
    """Whether warming up reached steady times."""
    file_bytes: int
    weights: int
    """Weight values stored in the file; an export has fewer where batch norms are folded."""
    miou: float | None = None
    """0..1, where a data set was given."""
    samples_ms: tuple[float, ...]
    """Every run, in the order measured; two per block."""


class LatencyReport(Settings):
    """What a comparison measured. The first artifact is the baseline."""

    size: tuple[int, int]
    """(height, width) of the images."""
    batch: int
    rounds: int
    """Blocks; each artifact ran twice in each."""
    threads: int | None
    entries: tuple[Latency, ...]
    floor: Ratio | None
    """Two sessions of the first artifact: what is not distinguishable from equal."""
    dataset: str | None = None

    def table(self) -> "Table":
        """One row per artifact."""
        from rich.table import Table

        table = Table(title=f"latency, {self.size[1]}x{self.size[0]}, batch {self.batch}")
        table.title_justify = "left"
        for header in ("artifact", "runs in"):
            table.add_column(header)
        for header in ("median ms", "p90", "p99", "ratio [95 %]", "mIoU %", "MB", "weights"):
            table.add_column(header, justify="right")
        for entry in self.entries:
            table.add_row(
                entry.name,
                f"{entry.backend}, {entry.device}, {entry.precision}",
                f"{entry.median_ms:.2f}",
                f"{entry.p90_ms:.2f}",
                f"{entry.p99_ms:.2f}",
                "1" if entry.ratio is None else str(entry.ratio),
                percent(entry.miou),
                f"{entry.file_bytes / 1e6:.1f}",
                f"{entry.weights:,}",
            )
        table.caption = self._caption()
        table.caption_justify = "left"
        return table

    def _caption(self) -> str:
        lines = [
            f"{self.rounds} interleaved blocks, each artifact twice in each; wall time per run"
        ]
        if self.floor is not None:
            lines.append(f"noise floor, the first against itself: {self.floor}")
        unsettled = [entry.name for entry in self.entries if not entry.settled]
        if unsettled:
            lines.append(f"times never settled while warming up: {', '.join(unsettled)}")
        return "\n".join(lines)


def compare_latency(
    runtimes: Sequence[Runtime],
    images: Pixels,
    rounds: int = 30,
    *,
    names: Sequence[str] | None = None,
    twin: Runtime | None = None,
    threads: int | None = None,
    seed: int = 0,
) -> LatencyReport:
    """Measures open runtimes on `images` uint8 [N, H, W, 3]; the first is the baseline.

    twin: a second session of the first, for the noise floor. threads: what the runtimes were given,
    for the record. Only relative figures carry over to another moment or machine.
    """
    assert runtimes
    assert rounds >= 2
    names = list(names) if names is not None else _names(runtimes)
    everyone = [*runtimes, twin] if twin is not None else list(runtimes)
    settled = [warm_up(runtime, images) for runtime in everyone]
    times = _interleaved(everyone, images, rounds)
    blocks = times.mean(axis=2)
    entries = []
    for index, runtime in enumerate(runtimes):
        samples = times[index].ravel()
        median, p90, p99 = np.percentile(samples, (50, 90, 99))
        entries.append(
            Latency(
                name=names[index],
                path=str(runtime.path),
                backend=runtime.backend,
                device=runtime.device,
                precision=runtime.precision,
                median_ms=float(median),
                p90_ms=float(p90),
                p99_ms=float(p99),
                ratio=None if index == 0 else paired_ratio(blocks[0], blocks[index], seed),
                settled=settled[index],
                file_bytes=runtime.artifact.file.stat().st_size,
                weights=runtime.artifact.count_weights(),
                samples_ms=tuple(round(float(sample), 4) for sample in samples),
            )
        )
    return LatencyReport(
        size=(images.shape[1], images.shape[2]),
        batch=images.shape[0],
        rounds=rounds,
        threads=threads,
        entries=tuple(entries),
        floor=None if twin is None else paired_ratio(blocks[0], blocks[-1], seed),
    )


def bench(
    paths: Sequence[Path],
    *,
    extra: Sequence[tuple[str, Path]] = (),
    dataset: "DataSet | None" = None,
    size: tuple[int, int] | None = None,
    batch: int = 1,
    rounds: int = 30,
    device: str = "cpu",
    runtime: str = "auto",
    threads: int | None = None,
    precision: str | None = None,
    spec: Spec | None = None,
    limit: int | None = None,
) -> LatencyReport:
    """Opens the artifacts, compares their latency, and their accuracy where `dataset` is given.

    extra: (name, path) of further graphs that are timed but not scored. size: (height, width); by
    default the fixed or usual one of the first artifact. limit: photos to score. runtime,
    precision: as open_runtime takes them, the same for all. spec: for those artifacts that carry
    none, where there are such. Raises UserError.
    """
    foreign = [open_artifact(path).spec is None for path in paths]
    specs = [spec if one or not any(foreign) else None for one in foreign]
    for_graphs = "auto" if runtime == "torch" else runtime
    with ExitStack() as stack:
        scored = [
            stack.enter_context(open_runtime(path, device, runtime, own, threads, precision))
            for path, own in zip(paths, specs, strict=True)
        ]
        others = [
            stack.enter_context(
                open_runtime(path, device, for_graphs, threads=threads, precision=precision)
            )
            for _, path in extra
        ]
        twin = stack.enter_context(
            open_runtime(paths[0], device, runtime, specs[0], threads, precision)
        )
        if dataset is not None:
            for one in scored:
                check_same_classes(one, dataset)
        images = bench_images(scored[0], dataset, size, batch)
        names = [*_names(scored), *(name for name, _ in extra)]
        report = compare_latency(
            [*scored, *others], images, rounds, names=names, twin=twin, threads=threads
        )
        if dataset is None:
            return report
        entries = list(report.entries)
        for index, one in enumerate(scored):
            miou = evaluate(one, dataset, limit).miou
            entries[index] = entries[index].model_copy(update={"miou": miou})
    where = f"{dataset.root} ({dataset.split})"
    return report.model_copy(update={"entries": tuple(entries), "dataset": where})


def bench_images(
    runtime: Runtime, dataset: "DataSet | None", size: tuple[int, int] | None, batch: int
) -> Pixels:
    """uint8 [batch, H, W, 3]: the data set's first photos, brought to the size, or noise."""
    _, height, width, _ = runtime.input_shape
    usual = runtime.spec.input.usual
    wanted = size if size is not None else (height or usual[0], width or usual[1])
    if dataset is None:
        noise = np.random.default_rng(0).integers(0, 256, (batch, *wanted, 3))
        return noise.astype(np.uint8)
    photos = [dataset.read(index % len(dataset))[0] for index in range(batch)]
    return np.stack([_resized(fit(photo, runtime.spec), wanted) for photo in photos])


def warm_up(runtime: Runtime, images: Pixels) -> bool:
    """Runs until the times are steady; False where they never were."""
    times: list[float] = []
    while len(times) < WARM_UP_MOST:
        times.append(_timed(runtime, images))
        if len(times) >= WARM_UP_LEAST:
            now, before = np.median(times[-3:]), np.median(times[-6:-3])
            if abs(now - before) < SETTLED * before:
                return True
    return False


def paired_ratio(baseline: Times, other: Times, seed: int = 0) -> Ratio:
    """Median of `other` over median of `baseline`, float [blocks] each, with a 95 % interval.

    The percentile bootstrap draws whole blocks, so that what slowed both in a block stays together.
    """
    drawn = np.random.default_rng(seed).integers(0, len(baseline), (RESAMPLES, len(baseline)))
    ratios = np.median(other[drawn], axis=1) / np.median(baseline[drawn], axis=1)
    low, high = np.percentile(ratios, (2.5, 97.5))
    return Ratio(
        value=float(np.median(other) / np.median(baseline)), low=float(low), high=float(high)
    )


def block_order(count: int, block: int) -> list[int]:
    """Who runs when in a block: all forth and back, starting with another one in each block."""
    forth = [(block + step) % count for step in range(count)]
    return [*forth, *reversed(forth)]


def _interleaved(runtimes: Sequence[Runtime], images: Pixels, rounds: int) -> Times:
    """Milliseconds, float [runtimes, rounds, 2]."""
    times = np.zeros((len(runtimes), rounds, 2))
    gc.collect()
    gc.disable()  # a collection would hit one of them at random
    try:
        for block in console.track(range(rounds), "bench", rounds):
            order = block_order(len(runtimes), block)
            for position, index in enumerate(order):
                second = position >= len(runtimes)
                times[index, block, int(second)] = _timed(runtimes[index], images)
    finally:
        gc.enable()
    return times


def _timed(runtime: Runtime, images: Pixels) -> float:
    """Milliseconds of one run, from bytes in to labels in the host's memory."""
    start = time.perf_counter()
    runtime.run(images)
    return 1000 * (time.perf_counter() - start)


def _resized(photo: Pixels, size: tuple[int, int]) -> Pixels:
    from PIL import Image

    picture = Image.fromarray(photo).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(picture)


def _names(runtimes: Sequence[Runtime]) -> list[str]:
    """The last parts of the paths; whole paths where those are not told apart by them."""
    short = [runtime.path.resolve().name for runtime in runtimes]
    if len(set(short)) < len(short):
        return [str(runtime.path) for runtime in runtimes]
    return short
