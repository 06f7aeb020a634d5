"""A benchmark in the terminal, at most 120 columns wide."""

from typing import TYPE_CHECKING

from srdeploy.serve.bench.contents import (
    MARKS,
    design,
    label,
    measures,
    milliseconds,
    ratio_text,
    ways,
)
from srdeploy.serve.bench.report_tables import (
    accuracy_table,
    checkpoint_table,
    cost_table,
)
from srdeploy.serve.bench.results import BenchReport, Cell
from srdeploy.serve.report import Table as PageTable

if TYPE_CHECKING:
    from rich.table import Table


def tables(report: BenchReport) -> list["Table"]:
    """Latency and cost of each cell, then the accuracy, where it was scored."""
    found = []
    for cell in report.cells:
        found += [_latency(cell), _table(cost_table(cell))]
    if report.accuracy is not None:
        found.append(_table(accuracy_table(report.accuracy)))
        matches = checkpoint_table(report.accuracy)
        if matches is not None:
            found.append(_table(matches))
    return found


def _latency(cell: Cell) -> "Table":
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
    table = _table(PageTable(f"Latency: {label(cell)}", (*header, "images/s"), rows))
    table.caption = design(cell)
    table.caption_justify = "left"
    return table


def _table(found: PageTable) -> "Table":
    """The same table for rich; names and numbers stand as they are, without markup."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(found.caption), title_justify="left")
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
