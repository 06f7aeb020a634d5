"""What a benchmark found: the contents of report.json. Times of runs are in milliseconds, for the
whole batch."""

from enum import StrEnum
from pathlib import Path
from typing import Any

from srdeploy.errors import UserError
from srdeploy.files import read_json, write_json
from srdeploy.metrics import Interval, Scores
from srdeploy.validation import Settings, validated


class LatencyOutcome(StrEnum):
    """What two latencies are shown to be, each claim with an error of at most 5 %."""

    EQUIVALENT = "EQUIVALENT"
    """The ratio lies within the margin."""
    DIFFERENT = "DIFFERENT"
    """The ratio lies outside the margin."""
    NOT_SHOWN = "NOT SHOWN"
    """Neither, with these runs."""


class LatencyVerdict(Settings):
    """Two one-sided tests of one artifact's latency against the first's."""

    outcome: LatencyOutcome
    margin: float
    """What the ratio was tested against: within 1 / (1 + margin) .. 1 + margin. The margin asked
    for, or the noise floor where that is larger."""
    p_equivalent: float
    """p value of the two one-sided tests against the margin; below 0.05 the ratio lies within."""
    p_different: float
    """p value of the one-sided test for lying beyond the margin; below 0.05 it does."""
    rounds_needed: int | None
    """NOT SHOWN: rounds after which the answer would come in 9 of 10 benchmarks, if the ratio is
    what it seems; None where no number of rounds would do."""
    reason: str
    """One sentence for people."""


class Quantiles(Settings):
    """Quantiles of all runs; none is left out. Intervals by the bootstrap over rounds."""

    median: Interval
    p90: Interval
    p95: Interval
    p99: Interval


class Latency(Settings):
    """One artifact's latency by one measure: end to end, or the GPU's own time."""

    quantiles: Quantiles
    ratio: Interval | None
    """Ratio to the first artifact's; None for the first itself."""
    verdict: LatencyVerdict | None
    """None for the first itself, and for rows for information."""
    round_ratios: tuple[float, ...] = ()
    """Ratio of each round, whose geometric mean is `ratio`; empty for the first itself."""
    rounds_ms: tuple[tuple[float, ...], ...]
    """Every run in the order measured, by round. Each round had freshly opened sessions."""


class Footprint(Settings):
    """What loading and one run cost in a fresh process."""

    import_s: float
    """Importing the runtime's library."""
    first_inference_s: float
    """Time from opening to the first labels, with the library imported."""
    own_mib: float
    """Peak of the process's memory (resident) above what it held before opening."""
    peak_mib: float
    """Peak of the process's memory, libraries included."""
    device_mib: float | None
    """Memory that the process held on the GPU after the run; None on a CPU, or where the driver
    doesn't tell."""


class Row(Settings):
    """One artifact in one cell of the matrix."""

    name: str
    path: str
    backend: str
    device: str
    precision: str
    """Precision of the arithmetic, as the runtime reports it."""
    end_to_end: Latency
    """Latency from images in host memory to labels in host memory."""
    device_time: Latency | None
    """The GPU's own time on the same runs, without copies; None where it is not known."""
    images_per_s: float
    """Throughput at the median latency."""
    settled: bool
    """Whether every session's times became steady while warming up."""
    file_bytes: int
    parameters: int
    """Weight values stored in the file; an export has fewer where batch norms are folded."""
    gmacs: float | None
    """10^9 multiply-accumulates of one run, whole batch; None where they can't be counted."""
    footprint: Footprint | None
    """None where it was not requested."""

    @property
    def timings(self) -> dict[str, Latency]:
        """Its measures by name."""
        found = {"end to end": self.end_to_end}
        return found if self.device_time is None else {**found, "GPU": self.device_time}


class Cell(Settings):
    """Artifacts timed against each other under one setting; the first row is the baseline."""

    runtime: str
    """Runtime as requested, e.g. auto."""
    precision: str | None
    """Precision of the arithmetic, as requested; None: what the artifacts say."""
    batch: int
    size: tuple[int, int]
    """(height, width) of the images."""
    rows: tuple[Row, ...]
    floor: Interval
    """Ratio of two sessions of the first artifact, end to end."""
    device_floor: Interval | None
    floor_rounds: tuple[float, ...] = ()
    """Ratio of each round, whose mean is `floor`."""
    device_floor_rounds: tuple[float, ...] = ()
    margin: float
    """Margin as requested."""
    rounds: int
    blocks: int
    """Per round; every session ran twice in each."""
    seconds: float
    """Time that measuring took."""
    stopped: str
    """Why no more rounds were run."""


class CheckpointMatch(Settings):
    """An export against the checkpoint that it was made from, on the same photos."""

    checkpoint: str
    agreement: float
    """Share of equal labels, over all pixels of all photos."""
    miou_difference: float
    """Export minus checkpoint, shares of 0..1."""
    passed: bool


class AccuracyRow(Settings):
    """One artifact's accuracy."""

    name: str
    scores: Scores
    checkpoint: CheckpointMatch | None
    """None if no checkpoint is known."""
    gains: dict[str, Interval] | None
    """miou, failure1, failure2 -> this one's minus the first's (shares of 0..1), paired bootstrap
    over images; None for the first itself. A failure that can't be measured is left out."""
    agreement: float | None
    """Share of labels equal to the first's; None for the first itself."""


class AccuracyResult(Settings):
    """Accuracy of all artifacts on one labelled split."""

    data: str
    split: str
    images: int
    rows: tuple[AccuracyRow, ...]
    most_different: tuple[str, ...]
    """Names of the photos on which the labels of the second and the first differ most."""


class MachineReport(Settings):
    """The machine while it was measured."""

    figures: dict[str, str]
    """Name -> value with its unit: governor, clocks, load, steal, temperature, ..."""
    warnings: tuple[str, ...]
    """What makes the latencies unreliable, in sentences."""


class BenchReport(Settings):
    """Everything that one benchmark found."""

    made: str
    """UTC, ISO 8601."""
    command: str
    environment: dict[str, str]
    threads: int | None
    """CPU threads as asked for; None: the runtime's default."""
    cells: tuple[Cell, ...]
    accuracy: AccuracyResult | None
    machine: MachineReport

    @property
    def passed(self) -> bool:
        """Whether every verdict is EQUIVALENT and every export matches its checkpoint."""
        verdicts = [
            timing.verdict.outcome is LatencyOutcome.EQUIVALENT
            for cell in self.cells
            for row in cell.rows
            for timing in row.timings.values()
            if timing.verdict is not None
        ]
        matches = [
            row.checkpoint.passed
            for row in (self.accuracy.rows if self.accuracy is not None else ())
            if row.checkpoint is not None
        ]
        return all(verdicts) and all(matches)


# The cells of a benchmark in progress, so that a stopped one can be resumed.

NAME = "partial.json"
"""File beside the report, until that is written."""


class Partial(Settings):
    """The request, and the cells measured so far, in the order of the settings."""

    request: dict[str, Any]
    """The request as JSON: files' hashes, settings, plan. Cells are valid only for the same one."""
    cells: tuple[Cell, ...] = ()


class PartialFile:
    """Keeps the cells in `folder`, whole after each; without a folder it keeps nothing."""

    def __init__(self, folder: Path | None, resume: bool) -> None:
        """Raises UserError where there is nothing to resume."""
        self._path = None if folder is None else folder / NAME
        self._resume = resume
        self._content = Partial(request={})
        if resume and (self._path is None or not self._path.is_file()):
            where = "--out names no folder" if folder is None else f"{folder} holds no {NAME}"
            raise UserError(f"--resume: no benchmark was stopped there ({where})")

    def begin(self, request: dict[str, Any]) -> tuple[Cell, ...]:
        """The cells that are there already. Raises UserError where they were of another request."""
        self._content = Partial(request=request)
        if self._resume:
            assert self._path is not None
            found = validated(Partial, read_json(self._path), str(self._path))
            for key, value in request.items():
                if found.request.get(key) != value:
                    raise UserError(
                        f"--resume: {self._path} was of another benchmark ({key} differs): give "
                        "the same arguments and files, or start anew without --resume"
                    )
            self._content = found
        return self._content.cells

    def add(self, cell: Cell) -> None:
        """Keeps one more cell."""
        self._content = self._content.model_copy(update={"cells": (*self._content.cells, cell)})
        if self._path is not None:
            write_json(self._path, self._content.model_dump(mode="json"))

    def end(self) -> None:
        """The report is written: nothing is left to resume."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
