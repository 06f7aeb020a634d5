"""A benchmark as Markdown that pastes into a comment: verdicts, tables, environment, command."""

import re
from collections.abc import Sequence

from srdeploy.serve.bench.contents import (
    MARKS,
    MATCHES,
    answers,
    conditions,
    design,
    equal_labels,
    label,
    margin_text,
    points,
    sentence,
    warnings,
)
from srdeploy.serve.bench.report_tables import (
    accuracy_table,
    checkpoint_table,
    cost_table,
    latency_table,
    overview_table,
    verdict_table,
)
from srdeploy.serve.bench.results import BenchReport
from srdeploy.serve.report import Table


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
