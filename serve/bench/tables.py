"""The sentences and tables of a benchmark.

The page, the Markdown text and the terminal show these alike. A line break in a cell separates an
estimate from its interval.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from srdeploy.metrics import Interval, percent
from srdeploy.pages.report import Table
from srdeploy.serve.bench.results import (
    AccuracyResult,
    BenchReport,
    Cell,
    Footprint,
    Latency,
    LatencyOutcome,
    LatencyVerdict,
    Row,
)

MARKS = {
    LatencyOutcome.EQUIVALENT: "✓ EQUIVALENT",
    LatencyOutcome.DIFFERENT: "✗ DIFFERENT",
    LatencyOutcome.NOT_SHOWN: "? NOT SHOWN",
}
MATCHES = {True: "✓ matches", False: "✗ DIFFERS"}
GAINS = (("miou", "mIoU"), ("failure1", "Failure-1"), ("failure2", "Failure-2"))
"""Keys of AccuracyRow.gains with their names, in the tables' order."""


@dataclass(frozen=True)
class LatencyComparison:
    """One verdict of the benchmark, with where it was found."""

    cell: Cell
    row: Row
    measure: str
    ratio: Interval
    verdict: LatencyVerdict

    @property
    def claim(self) -> str:
        """What was compared: "regulated against baseline, end to end"."""
        return f"{self.row.name} against {self.cell.rows[0].name}, {self.measure}"


def comparisons(report: BenchReport) -> list[LatencyComparison]:
    """Every verdict on latency, in the order of cells, rows and measures."""
    found = []
    for cell in report.cells:
        for row, measure, timing in measures(cell):
            if timing.verdict is not None:
                assert timing.ratio is not None  # a verdict is about a ratio
                found.append(LatencyComparison(cell, row, measure, timing.ratio, timing.verdict))
    return found


def measures(cell: Cell) -> Iterator[tuple[Row, str, Latency]]:
    """Every row under every measure, the measures one after the other."""
    for name in ("end to end", "GPU"):
        for row in cell.rows:
            if name in row.timings:
                yield row, name, row.timings[name]


def warnings(report: BenchReport) -> list[str]:
    """What makes the figures unreliable, in sentences: the machine, and sessions that never became
    steady."""
    found = [sentence(warning) for warning in report.machine.warnings]
    unsettled = Counter(row.name for cell in report.cells for row in cell.rows if not row.settled)
    if unsettled:
        count = len(report.cells)
        where = [
            name if count == 1 else f"{name} (in {often} of {count} settings)"
            for name, often in unsettled.items()
        ]
        found.append(f"Times never became steady while warming up: {', '.join(where)}.")
    return found


def artifact_names(report: BenchReport) -> list[str]:
    """Every artifact's name once, in order of appearance."""
    rows = [row.name for cell in report.cells for row in cell.rows]
    scored = [row.name for row in report.accuracy.rows] if report.accuracy is not None else []
    return list(dict.fromkeys([*rows, *scored]))


def sentence(text: str) -> str:
    """The text with a capital letter in front and a full stop behind it."""
    return f"{text[0].upper()}{text[1:].removesuffix('.')}."


def label(cell: Cell) -> str:
    """The cell's setting: "onnxruntime, float32, batch 1, 360x480" (height x width)."""
    parts = [cell.runtime] if cell.precision is None else [cell.runtime, cell.precision]
    return ", ".join([*parts, f"batch {cell.batch}", f"{cell.size[0]}x{cell.size[1]}"])


def ways(row: Row) -> str:
    """What the artifact ran in: "onnxruntime, cpu, float32"."""
    return f"{row.backend}, {row.device}, {row.precision}"


def margin_text(margin: float) -> str:
    """A margin in percent: "1 %"."""
    return f"{100 * margin:.3g} %"


def ratio_text(interval: Interval | None) -> str:
    """A ratio above its interval; "1" for the first artifact itself."""
    return "1" if interval is None else broken(interval, ".3f")


def broken(interval: Interval, form: str) -> str:
    """An estimate above its interval, each number in the format `form`."""
    value, low, high = (format(one, form) for one in (interval.value, interval.low, interval.high))
    return f"{value}\n[{low}, {high}]"


def points(interval: Interval) -> str:
    """A difference of shares with its interval on one line, in percentage points."""
    value, low, high = (100 * one for one in (interval.value, interval.low, interval.high))
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def equal_labels(share: float) -> str:
    """Share of equal labels in percent, rounded down: 100 says that all of them are."""
    return f"{math.floor(1e6 * share) / 1e4:.4f}"


def conditions(report: BenchReport) -> str:
    """One sentence on what was compared and how."""
    cells = "one setting" if len(report.cells) == 1 else f"{len(report.cells)} settings"
    threads = "" if report.threads is None else f", {report.threads} CPU threads"
    return (
        f"{', '.join(artifact_names(report))}: {cells}{threads}; {report.made}. The first artifact "
        "is the baseline. Every run counts; none is left out."
    )


def design(cell: Cell) -> str:
    """How the cell was measured: rounds, blocks, seconds, floor, margin, unsteady sessions."""
    unsettled = [row.name for row in cell.rows if not row.settled]
    floor = f"noise floor, the first against itself: {cell.floor}"
    if cell.device_floor is not None:
        floor += f", GPU {cell.device_floor}"
    return (
        f"{cell.rounds} rounds of freshly opened sessions, {cell.blocks} interleaved blocks each, "
        f"two runs per artifact and block; {cell.seconds:.0f} s; stopped: {cell.stopped}; {floor}; "
        f"margin asked for: {margin_text(cell.margin)}; ratios are of runs of the same moment, and "
        "medians of all runs, so the two can disagree if the machine's speed drifted"
        + (f"; never steady while warming up: {', '.join(unsettled)}" if unsettled else "")
    )


def milliseconds(typical: float) -> str:
    """The number format in which times like `typical`, in milliseconds, are told apart."""
    return ".2f" if typical >= 10 else ".3f"


def summary_tables(report: BenchReport) -> list[Table]:
    """For the terminal: latency and cost of each cell, then the accuracy where it was scored."""
    found: list[Table | None] = []
    for cell in report.cells:
        found += [short_latency_table(cell), cost_table(cell)]
    if report.accuracy is not None:
        found += [accuracy_table(report.accuracy), checkpoint_table(report.accuracy)]
    return [table for table in found if table is not None]


def latency_table(cell: Cell) -> Table:
    """Quantiles with intervals, ratio and throughput; one row per artifact and measure."""
    rows = []
    for row, measure, timing in measures(cell):
        spans = timing.quantiles
        form = milliseconds(spans.median.value)
        quantiles = (spans.median, spans.p90, spans.p95, spans.p99)
        rows.append(
            (
                _row_name(cell, row, measure),
                *(broken(one, form) for one in quantiles),
                ratio_text(timing.ratio),
                _throughput(row, measure),
            )
        )
    return Table(
        f"Milliseconds per run of {cell.batch}, with 95 % intervals{_common_way(cell)}",
        ("artifact", "median", "p90", "p95", "p99", "ratio [95 %]", "images/s"),
        rows,
    )


def short_latency_table(cell: Cell) -> Table:
    """`latency_table` for 120 columns: verdicts instead of intervals of quantiles."""
    rows = []
    for row, measure, timing in measures(cell):
        spans = timing.quantiles
        form = milliseconds(spans.median.value)
        verdict = "-" if timing.verdict is None else MARKS[timing.verdict.outcome]
        rows.append(
            (
                _row_name(cell, row, measure),
                *(format(one.value, form) for one in (spans.median, spans.p90, spans.p99)),
                ratio_text(timing.ratio).replace("\n", " "),
                verdict,
                _throughput(row, measure),
            )
        )
    return Table(
        f"Latency: {label(cell)}{_common_way(cell)}",
        ("artifact", "median ms", "p90", "p99", "ratio [95 %]", "verdict", "images/s"),
        rows,
        note=sentence(design(cell)),
    )


def verdict_table(cell: Cell) -> Table | None:
    """Every verdict with its reason; None where the cell has none."""
    rows = []
    for row, measure, timing in measures(cell):
        verdict = timing.verdict
        if verdict is None:
            continue
        rows.append(
            (
                f"{row.name}, {measure}",
                MARKS[verdict.outcome],
                ratio_text(timing.ratio),
                margin_text(verdict.margin),
                f"{verdict.p_equivalent:.2g}",
                f"{verdict.p_different:.2g}",
                "-" if verdict.rounds_needed is None else str(verdict.rounds_needed),
                sentence(verdict.reason),
            )
        )
    if not rows:
        return None
    header = ("artifact", "verdict", "ratio [95 %]", "margin", "p within", "p beyond")
    return Table(
        f"Two one-sided tests against {cell.rows[0].name}",
        (*header, "rounds needed", "reason"),
        rows,
        prose=True,
    )


def cost_table(cell: Cell) -> Table:
    """What each artifact costs apart from its latency."""
    return Table(
        "Cost. Memory is the peak of a fresh process: its own part, and with all libraries",
        (
            "artifact",
            "file, MB",
            "parameters",
            "GMACs",
            "own MiB",
            "all MiB",
            "GPU MiB",
            "import, s",
            "first labels, s",
        ),
        [
            (
                row.name,
                f"{row.file_bytes / 1e6:.2f}",
                f"{row.parameters:,}",
                "-" if row.gmacs is None else f"{row.gmacs:.2f}",
                *_footprint(row.footprint),
            )
            for row in cell.rows
        ],
    )


def accuracy_table(accuracy: AccuracyResult) -> Table:
    """Scores in percent, and below each its gain over the first artifact with the interval."""
    rows = []
    for row in accuracy.rows:
        scores, gains = row.scores, row.gains or {}
        cells = [
            percent(share) + (f"\n{points(gains[key])}" if key in gains else "")
            for (key, _), share in zip(
                GAINS, (scores.miou, scores.failure1, scores.failure2), strict=True
            )
        ]
        agreement = percent(row.agreement)
        rows.append((row.name, *cells, percent(row.scores.pixel_accuracy), agreement))
    return Table(
        f"{accuracy.data} ({accuracy.split}), {accuracy.images} images; percent, and below it the "
        "difference to the first in points [95 %]",
        ("artifact", *(name for _, name in GAINS), "pixel accuracy", "labels as the first"),
        rows,
    )


def checkpoint_table(accuracy: AccuracyResult) -> Table | None:
    """Exports against the checkpoints that they were made from; None where none is known."""
    rows = [
        (
            row.name,
            MATCHES[row.checkpoint.passed],
            equal_labels(row.checkpoint.agreement),
            f"{100 * row.checkpoint.miou_difference:+.4f}",
            row.checkpoint.checkpoint,
        )
        for row in accuracy.rows
        if row.checkpoint is not None
    ]
    if not rows:
        return None
    header = ("artifact", "verdict", "equal labels, %", "mIoU, points", "checkpoint")
    return Table("Exports against their own checkpoints", header, rows, prose=True)


def overview_table(report: BenchReport, anchors: Sequence[str] = ()) -> Table:
    """One row per setting and artifact: median end to end, ratio, verdicts of all measures. A
    setting is named in its first row.

    anchors: one per cell, for links.
    """
    rows = []
    links: list[str] = []
    for index, cell in enumerate(report.cells):
        for place, row in enumerate(cell.rows):
            verdicts = [
                ("" if measure == "end to end" else f"{measure} ") + MARKS[timing.verdict.outcome]
                for measure, timing in row.timings.items()
                if timing.verdict is not None
            ]
            median = row.end_to_end.quantiles.median.value
            rows.append(
                (
                    label(cell) if place == 0 else "",
                    row.name,
                    format(median, milliseconds(median)),
                    ratio_text(row.end_to_end.ratio).replace("\n", " "),
                    "\n".join(verdicts) or "-",
                    f"{row.images_per_s:.1f}",
                )
            )
            if anchors:
                links.append(anchors[index] if place == 0 else "")
    header = ("setting", "artifact", "median ms", "ratio [95 %]", "verdict", "images/s")
    return Table("Latency end to end", header, rows, links=links)


def _row_name(cell: Cell, row: Row, measure: str) -> str:
    """The artifact's name, with the measure and with what it ran in where rows differ in these."""
    name = (
        row.name if all(one.device_time is None for one in cell.rows) else f"{row.name}, {measure}"
    )
    return name if _common_way(cell) else f"{name}\n{ways(row)}"


def _common_way(cell: Cell) -> str:
    """What all rows ran in, for a caption; empty where they differ."""
    found = {ways(row) for row in cell.rows}
    return f"; {found.pop()}" if len(found) == 1 else ""


def _throughput(row: Row, measure: str) -> str:
    return f"{row.images_per_s:.1f}" if measure == "end to end" else "-"


def _footprint(found: Footprint | None) -> tuple[str, str, str, str, str]:
    if found is None:
        return ("-", "-", "-", "-", "-")
    return (
        f"{found.own_mib:.0f}",
        f"{found.peak_mib:.0f}",
        "-" if found.device_mib is None else f"{found.device_mib:.0f}",
        f"{found.import_s:.2f}",
        f"{found.first_inference_s:.2f}",
    )
