"""A benchmark in the terminal, at most 120 columns wide."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from srdeploy.pages.report import Table
from srdeploy.serve.bench.report_tables import (
    MARKS,
    MATCHES,
    accuracy_table,
    answers,
    checkpoint_table,
    conditions,
    cost_table,
    design,
    equal_labels,
    label,
    latency_table,
    margin_text,
    measures,
    milliseconds,
    overview_table,
    points,
    ratio_text,
    sentence,
    verdict_table,
    warnings,
    ways,
)
from srdeploy.serve.bench.results import BenchReport, Cell

if TYPE_CHECKING:
    from rich.table import Table as RichTable


def tables(report: BenchReport) -> list["RichTable"]:
    """Latency and cost of each cell, then the accuracy, where it was scored."""
    found = []
    for cell in report.cells:
        found += [_latency(cell), _rich_table(cost_table(cell))]
    if report.accuracy is not None:
        found.append(_rich_table(accuracy_table(report.accuracy)))
        matches = checkpoint_table(report.accuracy)
        if matches is not None:
            found.append(_rich_table(matches))
    return found


def _latency(cell: Cell) -> "RichTable":
    rows = []
    for row, measure, timing in measures(cell):
        spans = timing.quantiles
        form = milliseconds(spans.median.value)
        quantiles = [format(one.value, form) for one in (spans.median, spans.p90, spans.p99)]
        verdict = "-" if timing.verdict is None else MARKS[timing.verdict.outcome]
        end_to_end = measure == "end to end"
        rows.append(
            (
                row.name if end_to_end else f"{row.name}, GPU",
                ways(row),
                *quantiles,
                ratio_text(timing.ratio).replace("\n", " "),
                verdict,
                f"{row.images_per_s:.1f}" if end_to_end else "-",
            )
        )
    header = ("artifact", "runs in", "median ms", "p90", "p99", "ratio [95 %]", "verdict")
    table = _rich_table(Table(f"Latency: {label(cell)}", (*header, "images/s"), rows))
    table.caption = design(cell)
    table.caption_justify = "left"
    return table


def _rich_table(found: Table) -> "RichTable":
    """The same table for rich; names and numbers stand as they are, without markup."""
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(title=Text(found.caption), title_justify="left")
    for index, header in enumerate(found.header):
        last = index == len(found.header) - 1
        left = index == 0 or header == "runs in" or (found.prose and last)
        # Names and paths may be long: they wrap, so that figures never do.
        table.add_column(
            Text(header), justify="left" if left else "right", no_wrap=not left, overflow="fold"
        )
    for row in found.rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


# A benchmark as Markdown that pastes into a comment: verdicts, tables, environment, command.


def to_markdown(report: BenchReport) -> str:
    """The report in GitHub's Markdown; ends with a line break."""
    parts = ["## srdeploy bench", _escaped(conditions(report)), _verdicts(report)]
    found = warnings(report)
    if found:
        parts.append("\n".join(["> **Read these figures with care**", *map(_quoted, found)]))
    if len(report.cells) > 1:
        parts.append(_table(overview_table(report)))
    for cell in report.cells:
        parts += [f"### {_escaped(label(cell))}", _escaped(sentence(design(cell)))]
        tables = (latency_table(cell), verdict_table(cell), cost_table(cell))
        parts += [_table(table) for table in tables if table is not None]
    if report.accuracy is not None:
        parts += ["### Accuracy", _table(accuracy_table(report.accuracy))]
        matches = checkpoint_table(report.accuracy)
        if matches is not None:
            parts.append(_table(matches))
    machine = {**report.machine.figures, **report.environment}
    parts += [
        "### Machine and environment",
        _table(Table("", ("what", "value"), [*machine.items()], prose=True)),
        "### Command",
        _fenced(report.command),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _verdicts(report: BenchReport) -> str:
    lines = []
    several = len(report.cells) > 1
    for answer in answers(report):
        where = f" ({label(answer.cell)})" if several else ""
        margin = margin_text(answer.verdict.margin)
        lines.append(
            f"- **{MARKS[answer.verdict.outcome]}** "
            + _escaped(
                f"{answer.claim}{where}: ratio {answer.ratio}, margin {margin}. "
                f"{sentence(answer.verdict.reason)}"
            )
        )
    for row in report.accuracy.rows if report.accuracy is not None else ():
        if row.checkpoint is not None:
            text = (
                f"{row.name}, its own checkpoint: {equal_labels(row.checkpoint.agreement)} % equal"
            )
            lines.append(f"- **{MATCHES[row.checkpoint.passed]}** {_escaped(text)}")
        if row.gains is not None and "miou" in row.gains:
            text = f"{row.name}, mIoU gain in points [95 %]: {points(row.gains['miou'])}"
            lines.append(f"- {_escaped(text)}")
    return "\n".join(lines)


def _table(table: Table) -> str:
    """A pipe table under its caption; the first column, and the last of prose, to the left."""
    count = len(table.header)
    rules = [":--" if i == 0 or (table.prose and i == count - 1) else "--:" for i in range(count)]
    lines = [_row(table.header), f"| {' | '.join(rules)} |", *map(_row, table.rows)]
    caption = f"{_escaped(table.caption)}\n\n" if table.caption else ""
    return caption + "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_escaped(cell) for cell in cells)} |"


def _quoted(text: str) -> str:
    return f"> - {_escaped(text)}"


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    plain = " ".join(text.split())
    return re.sub(r"([\\|`*_<>\[\]#$~&])", r"\\\1", plain)


def _fenced(text: str) -> str:
    """A code block whose fence is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}sh\n{text}\n{fence}"
