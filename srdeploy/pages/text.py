"""The contents of a page as Markdown and in the terminal: the same verdicts, tables and words."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from srdeploy import console
from srdeploy.pages.report import Block, Code, Report, Section, Table, Text, Verdict

if TYPE_CHECKING:
    from rich.table import Table as RichTable

MARKS = {"passed": "✓ ", "failed": "✗ ", "undecided": "? ", "figure": ""}
"""The mark before a verdict's figure, by its state."""


def to_markdown(report: Report) -> str:
    """The report in GitHub's Markdown, without its pictures; ends with a line break.

    No text can become markup.
    """
    parts = [f"## {_escaped(report.title)}", _escaped(report.lead)]
    if report.warnings:
        quoted = (f"> - {_escaped(warning)}" for warning in report.warnings)
        parts.append("\n".join(["> **Read these figures with care**", *quoted]))
    parts.append("\n".join(map(_verdict, report.verdicts)))
    for section in report.sections:
        parts += _section(section)
    environment = Table("", ("what", "value"), [*report.environment.items()], prose=True)
    parts += ["### Environment", _table(environment)]
    if report.command:
        parts += ["### Command", _fenced(report.command)]
    return "\n\n".join(part for part in parts if part) + "\n"


def tell_verdicts(verdicts: Iterable[Verdict]) -> None:
    """Prints verdicts to stderr, one a line, each with its mark."""
    tellers = {"passed": console.done, "failed": console.failed, "undecided": console.warn}
    for verdict in verdicts:
        detail = f". {verdict.detail}" if verdict.detail else ""
        tellers.get(verdict.state, console.say)(f"{verdict.figure}: {verdict.claim}{detail}")


def rich_table(table: Table) -> "RichTable":
    """The table for `console.print_table`; names are no markup."""
    from rich.table import Table as RichTable
    from rich.text import Text as RichText

    shown = RichTable(title=RichText(table.caption), title_justify="left")
    shown.caption, shown.caption_justify = RichText(table.note), "left"
    for index, header in enumerate(table.header):
        # Names and paths may be long: they wrap, so that figures never do.
        left = index == 0 or (table.prose and index == len(table.header) - 1)
        justify: Literal["left", "right"] = "left" if left else "right"
        shown.add_column(RichText(header), justify=justify, no_wrap=not left, overflow="fold")
    for row in table.rows:
        shown.add_row(*map(RichText, row))
    return shown


def _verdict(verdict: Verdict) -> str:
    text = f"{verdict.claim}. {verdict.detail}" if verdict.detail else verdict.claim
    return f"- **{MARKS[verdict.state]}{_escaped(verdict.figure)}** {_escaped(text)}"


def _section(section: Section) -> Iterator[str]:
    """Heading, paragraph and blocks; nothing for a section of pictures."""
    blocks = [text for block in section.blocks if (text := _block(block))]
    if blocks or not section.blocks:
        yield f"### {_escaped(section.title)}"
        yield _escaped(section.text)
        yield from blocks


def _block(block: Block) -> str:
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Code):
        return _fenced(block.text)
    return _escaped(block.text) if isinstance(block, Text) else ""


def _table(table: Table) -> str:
    """A pipe table under its caption; the first column, and the last of prose, to the left."""
    count = len(table.header)
    rules = [":--" if i == 0 or (table.prose and i == count - 1) else "--:" for i in range(count)]
    lines = [_row(table.header), f"| {' | '.join(rules)} |", *map(_row, table.rows)]
    caption = f"{_escaped(table.caption)}\n\n" if table.caption else ""
    note = f"\n\n{_escaped(table.note)}" if table.note else ""
    return caption + "\n".join(lines) + note


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_escaped(cell) for cell in cells)} |"


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    plain = " ".join(text.split())
    return re.sub(r"([\\|`*_<>\[\]#$~&])", r"\\\1", plain)


def _fenced(text: str) -> str:
    """A code block whose fence is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}sh\n{text}\n{fence}"
