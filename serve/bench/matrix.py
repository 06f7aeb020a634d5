"""A whole benchmark: every setting in turn, then cost and accuracy, as one report."""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from srdeploy import console
from srdeploy.artifacts.artifact import open_artifact
from srdeploy.environment import PACKAGES, describe_environment
from srdeploy.files import sha256_of
from srdeploy.imaging import Pixels
from srdeploy.runtimes.base import Runtime
from srdeploy.runtimes.registry import open_runtime, runs_graphs, runtime_packages
from srdeploy.serve.bench.accuracy import DifferingPhoto, measure_accuracy
from srdeploy.serve.bench.entries import BenchEntry, Setting, bench_images
from srdeploy.serve.bench.footprint import measure_footprint
from srdeploy.serve.bench.machine import MachineMonitor
from srdeploy.serve.bench.macs import artifact_macs
from srdeploy.serve.bench.measure import BenchPlan, Measurements, TimedArtifact, measure
from srdeploy.serve.bench.results import (
    AccuracyResult,
    BenchReport,
    Cell,
    Footprint,
    Latency,
    LatencyVerdict,
    PartialFile,
    Row,
)
from srdeploy.serve.bench.verdict import judge, quantiles, ratio_interval
from srdeploy.serve.evaluate import check_same_classes

if TYPE_CHECKING:
    from srdeploy.data import DataSet


@dataclass(frozen=True)
class Benchmark:
    """What all cells of a benchmark share; `run` measures them."""

    device: str = "cpu"
    threads: int | None = None
    plan: BenchPlan = BenchPlan()
    dataset: "DataSet | None" = None
    limit: int | None = None
    """Photos to score; None: all."""
    costs: bool = True
    """Whether multiply-accumulates, memory and time to first inference are measured."""

    def open(self, entry: BenchEntry, setting: Setting, opening: int = 0) -> Runtime:
        """A fresh runtime, not open yet. Raises UserError as open_runtime."""
        return open_runtime(
            entry.file(setting, opening),
            self.device,
            setting.runtime,
            entry.spec,
            self.threads,
            setting.arithmetic,
        )

    def run(
        self,
        entries: Sequence[BenchEntry],
        settings: Sequence[Setting],
        command: str,
        partial: PartialFile | None = None,
    ) -> tuple[BenchReport, list[DifferingPhoto]]:
        """Measures everything; the first entry is the baseline of every cell.

        Every artifact runs once under every setting before anything is timed, so that what can't
        be run is said at once. partial: keeps each cell, and gives those that are there already.
        Raises UserError.
        """
        kept = partial if partial is not None else PartialFile(None, resume=False)
        cells = [*kept.begin(self._request(entries, settings))]
        trials = [self._try(entries, setting) for setting in settings[len(cells) :]]
        with MachineMonitor(self.device, self.threads) as watch:
            for trial in trials:
                cells.append(self._cell(trial, self._measure(trial, watch.sample)))
                kept.add(cells[-1])
        accuracy, photos = self._accuracy(entries, settings[0])
        report = BenchReport(
            made=datetime.now(UTC).isoformat(timespec="seconds"),
            command=command,
            environment=describe_environment([*PACKAGES, *runtime_packages(), "scipy"]),
            threads=self.threads,
            cells=tuple(cells),
            accuracy=accuracy,
            machine=watch.report(),
        )
        return report, photos

    def _request(
        self, entries: Sequence[BenchEntry], settings: Sequence[Setting]
    ) -> dict[str, Any]:
        """What the cells depend on, as JSON."""
        named = {
            f"{entry.name} for {setting.runtime} {setting.precision}": entry.file(setting)
            for entry in entries
            for setting in settings
        }
        # One file serves many settings, and may be large.
        hashes = {path: sha256_of(open_artifact(path).file) for path in set(named.values())}
        files = {name: hashes[path] for name, path in named.items()}
        request = {
            "files": files,
            "settings": [asdict(one) for one in settings],
            "plan": self.plan.model_dump(),
            "device": self.device,
            "threads": self.threads,
            "costs": self.costs,
        }
        return cast(dict[str, Any], json.loads(json.dumps(request)))

    def _try(self, entries: Sequence[BenchEntry], setting: Setting) -> "_Trial":
        images: Pixels | None = None
        rows: list[_TrialRow] = []
        for entry in entries:
            if not entry.judged and not runs_graphs(rows[0].backend):
                continue  # its time in another library would mean nothing
            runtime = self.open(entry, setting)
            if self.dataset is not None and entry.judged:
                check_same_classes(runtime, self.dataset)
            if images is None:
                images = bench_images(runtime, self.dataset, setting.size, setting.batch)
            with runtime:
                runtime.run(images)
                backend, precision = runtime.backend, runtime.precision
            costs = self._costs(entry, setting, images) if self.costs else (None, None)
            rows.append(_TrialRow(entry, backend, precision, *costs))
        assert images is not None
        return _Trial(setting, images, rows)

    def _costs(
        self, entry: BenchEntry, setting: Setting, images: Pixels
    ) -> tuple[int | None, Footprint]:
        """Multiply-accumulates and footprint."""
        console.say(f"cost of {entry.name}: multiply-accumulates, memory, first inference")
        path, size = entry.file(setting), (images.shape[1], images.shape[2])
        footprint = measure_footprint(
            path,
            setting.batch,
            size,
            device=self.device,
            runtime=setting.runtime,
            threads=self.threads,
            precision=setting.arithmetic,
            spec=entry.spec,
        )
        return artifact_macs(open_artifact(path), setting.batch, size), footprint

    def _measure(self, trial: "_Trial", sample: Callable[[], object]) -> Measurements:
        artifacts = [
            TimedArtifact(one.entry.name, _opener(self, one.entry, trial.setting), one.entry.judged)
            for one in trial.rows
        ]
        console.say(f"timing {', '.join(one.name for one in artifacts)}: {trial}")
        return measure(artifacts, trial.images, self.plan, sample=sample)

    def _cell(self, trial: "_Trial", found: Measurements) -> Cell:
        setting = trial.setting
        floor = found.ratios(1)
        device_floor = found.ratios(1, device=True) if found.device is not None else None
        return Cell(
            runtime=setting.runtime,
            precision=setting.precision,
            batch=setting.batch,
            size=trial.size,
            rows=tuple(self._row(index, trial, found) for index in range(len(trial.rows))),
            floor=ratio_interval(floor),
            device_floor=None if device_floor is None else ratio_interval(device_floor),
            floor_rounds=tuple(np.exp(floor).tolist()),
            device_floor_rounds=()
            if device_floor is None
            else tuple(np.exp(device_floor).tolist()),
            margin=self.plan.margin,
            rounds=len(found.end_to_end),
            blocks=found.blocks,
            seconds=found.seconds,
            stopped=found.stopped,
        )

    def _row(self, index: int, trial: "_Trial", found: Measurements) -> Row:
        setting, one = trial.setting, trial.rows[index]
        entry = one.entry
        path = entry.file(setting)
        artifact = open_artifact(path)
        whole = _timing(found, index, entry.judged, self.plan.margin, device=False)
        return Row(
            name=entry.name,
            path=str(path),
            backend=one.backend,
            device=self.device,
            precision=one.precision,
            end_to_end=whole,
            device_time=None
            if found.device is None
            else _timing(found, index, entry.judged, self.plan.margin, device=True),
            images_per_s=1000 * setting.batch / whole.quantiles.median.value,
            settled=all(found.settled[session] for session in _sessions(index)),
            file_bytes=artifact.file.stat().st_size,
            parameters=artifact.count_weights(),
            gmacs=None if one.macs is None else one.macs / 1e9,
            footprint=one.footprint,
        )

    def _accuracy(
        self, entries: Sequence[BenchEntry], setting: Setting
    ) -> tuple[AccuracyResult | None, list[DifferingPhoto]]:
        if self.dataset is None:
            return None, []
        scored = [entry for entry in entries if entry.judged]
        opened: dict[Path, Runtime] = {}
        with ExitStack() as stack:
            for entry in scored:
                path = entry.file(setting)
                if path not in opened:
                    opened[path] = stack.enter_context(self.open(entry, setting))
            for entry in scored:
                if entry.checkpoint is not None and entry.checkpoint not in opened:
                    opened[entry.checkpoint] = stack.enter_context(
                        open_runtime(entry.checkpoint, self.device, "torch", threads=self.threads)
                    )
            return measure_accuracy(
                [opened[entry.file(setting)] for entry in scored],
                [entry.name for entry in scored],
                self.dataset,
                self.limit,
                [
                    None
                    if entry.checkpoint is None or entry.file(setting) == entry.checkpoint
                    else (str(entry.checkpoint), opened[entry.checkpoint])
                    for entry in scored
                ],
            )


@dataclass(frozen=True)
class _TrialRow:
    """An entry that ran once under a setting, and what its runtime said then."""

    entry: BenchEntry
    backend: str
    precision: str
    macs: int | None
    footprint: Footprint | None


@dataclass(frozen=True)
class _Trial:
    """A setting that every entry ran once under, but those that were left out."""

    setting: Setting
    images: Pixels
    rows: list[_TrialRow]

    @property
    def size(self) -> tuple[int, int]:
        return self.images.shape[1], self.images.shape[2]

    def __str__(self) -> str:
        setting, (height, width) = self.setting, self.size
        words = [setting.runtime, *filter(None, [setting.precision])]
        return f"{' '.join(words)}, batch {setting.batch}, {height}x{width}"


def _opener(bench: Benchmark, entry: BenchEntry, setting: Setting) -> Callable[[int], Runtime]:
    return lambda opening: bench.open(entry, setting, opening)


def _sessions(index: int) -> tuple[int, ...]:
    """The sessions of the row `index`; the first has two."""
    return (0, 1) if index == 0 else (index + 1,)


def _timing(found: Measurements, index: int, judged: bool, margin: float, device: bool) -> Latency:
    rounds = found.runs(_sessions(index), device)
    ratios = found.ratios(index + 1, device) if index else []
    return Latency(
        quantiles=quantiles(rounds),
        ratio=ratio_interval(ratios) if index else None,
        verdict=_verdict(found, ratios, margin, device) if index and judged else None,
        round_ratios=tuple(np.exp(ratios).tolist()),
        rounds_ms=tuple(tuple(round(ms, 4) for ms in one) for one in rounds),
    )


def _verdict(
    found: Measurements, ratios: Sequence[float], margin: float, device: bool
) -> LatencyVerdict:
    """The verdict, with the budget that the rounds it asks for would take on this machine."""
    verdict = judge(ratios, found.ratios(1, device), margin)
    if verdict.rounds_needed is None:
        return verdict
    seconds = 1.1 * found.seconds * verdict.rounds_needed / len(found.end_to_end)
    budget = 10 * math.ceil(seconds / 10)
    return verdict.model_copy(update={"reason": f"{verdict.reason} (--budget {budget})"})
