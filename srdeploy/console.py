"""What people see while a verb runs. Messages and progress go to stderr; stdout carries results
only."""

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

Item = TypeVar("Item")
_quiet = False
_follows = False


def set_quiet(quiet: bool) -> None:
    """Silences messages and progress; warnings, errors and results stay."""
    global _quiet
    _quiet = quiet or _follows


def follow() -> None:
    """Silences all but errors and results: another process of the same job speaks."""
    global _quiet, _follows
    _quiet = _follows = True


@cache
def stderr() -> "Console":
    """The console for everything that is not a result. A file called :smile: keeps its name."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def say(message: str) -> None:
    """One plain line about what happens; square brackets are printed as they are."""
    if not _quiet:
        stderr().print(message, markup=False)


def done(message: str) -> None:
    """One line for a step that went well."""
    if not _quiet:
        _print_marked("✓", "green", message)


def failed(message: str) -> None:
    """One line for a verdict that went against the artifact."""
    _print_marked("✗", "red", message)


def warn(message: str) -> None:
    """One line that people should read although the job continues."""
    if not _follows:
        _print_marked("warning:", "yellow", message)


def error(message: str) -> None:
    """One line for what ended the verb; line breaks in it become spaces."""
    _print_marked("error:", "red", " ".join(message.split()))


def _print_marked(mark: str, style: str, message: str) -> None:
    # As one piece: processes that share a terminal or a pipe would write between two.
    from rich.text import Text

    stderr().print(Text.assemble((mark, style), " ", message))


def print_json(value: Any) -> None:
    """The result of a verb under --json: one object on stdout and nothing else."""
    sys.stdout.write(json.dumps(value, allow_nan=False) + "\n")


def print_table(table: "Table") -> None:
    """The result of a verb for people, on stdout."""
    from rich.console import Console

    console = Console(highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = (
            120  # a pipe has no width; tables that wrap at 80 are hard to read and to grep
        )
    console.print(table)


@contextmanager
def progress(*columns: str) -> Iterator["Progress"]:
    """A rich progress display on stderr: description, bar, count, elapsed and remaining time.

    `columns` are extra text columns in rich's format, e.g. "{task.fields[loss]}".
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        *(TextColumn(column) for column in columns),
        console=stderr(),
        transient=True,
        disable=_quiet or not stderr().is_terminal,
    ) as bar:
        yield bar


def track(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Yields `items` under a progress bar."""
    with progress() as bar:
        yield from bar.track(items, total=total, description=description)
