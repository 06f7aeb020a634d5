"""What a benchmark has to say, in words: the page, the Markdown text and the terminal say it
alike."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from srdeploy.metrics import Interval
from srdeploy.serve.bench.results import BenchReport, Cell, Outcome, Row, Timing, Verdict

MARKS = {
    Outcome.EQUIVALENT: "✓ EQUIVALENT",
    Outcome.DIFFERENT: "✗ DIFFERENT",
    Outcome.NOT_SHOWN: "? NOT SHOWN",
}
MATCHES = {True: "✓ matches", False: "✗ DIFFERS"}


@dataclass(frozen=True)
class Answer:
    """One verdict of the benchmark, with where it was found."""

    cell: Cell
    row: Row
    measure: str
    ratio: Interval
    verdict: Verdict

    @property
    def claim(self) -> str:
        """What was compared: "regulated against baseline, end to end"."""
        return f"{self.row.name} against {self.cell.rows[0].name}, {self.measure}"


def answers(report: BenchReport) -> list[Answer]:
    """Every verdict on latency, in the order of cells, rows and measures."""
    found = []
    for cell in report.cells:
        for row, measure, timing in measures(cell):
            if timing.verdict is not None:
                assert timing.ratio is not None  # a verdict is about a ratio
                found.append(Answer(cell, row, measure, timing.ratio, timing.verdict))
    return found


def measures(cell: Cell) -> Iterator[tuple[Row, str, Timing]]:
    """Every row under every measure, the measures one after the other."""
    for name in ("end to end", "GPU"):
        for row in cell.rows:
            if name in row.timings:
                yield row, name, row.timings[name]


def warnings(report: BenchReport) -> list[str]:
    """What makes the figures weak, in sentences: of the machine, and of sessions that never became
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
    """How the cell was measured: rounds, blocks, seconds, floor, margin, who never settled."""
    unsettled = [row.name for row in cell.rows if not row.settled]
    floor = f"noise floor, the first against itself: {cell.floor}"
    if cell.device_floor is not None:
        floor += f", GPU {cell.device_floor}"
    return (
        f"{cell.rounds} rounds of freshly opened sessions, {cell.blocks} interleaved blocks each, "
        f"two runs per artifact and block; {cell.seconds:.0f} s; stopped: {cell.stopped}; {floor}; "
        f"margin asked for: {margin_text(cell.margin)}; ratios are of runs of the same moment, and "
        "medians of all runs, so that the two part where the machine's own speed changed"
        + (f"; never steady while warming up: {', '.join(unsettled)}" if unsettled else "")
    )


def milliseconds(typical: float) -> str:
    """The number format in which times like `typical`, in milliseconds, are told apart."""
    return ".2f" if typical >= 10 else ".3f"
