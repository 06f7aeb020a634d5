"""Messages on stderr: each is one line, written as one piece."""

import sys
from collections.abc import Callable
from io import StringIO

import pytest

from srdeploy import console


class Pieces(StringIO):
    """A stream that remembers what each write brought."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[str] = []

    def write(self, text: str) -> int:
        self.written.append(text)
        return super().write(text)


@pytest.mark.parametrize(
    ("print_one", "line"),
    [
        (console.say, "a [b] :smile:\n"),
        (console.done, "✓ a [b] :smile:\n"),
        (console.failed, "✗ a [b] :smile:\n"),
        (console.warn, "warning: a [b] :smile:\n"),
        (console.error, "error: a [b] :smile:\n"),
    ],
)
def test_a_message_is_written_as_one_piece_among_those_of_other_processes(
    monkeypatch: pytest.MonkeyPatch, print_one: Callable[[str], None], line: str
) -> None:
    pieces = Pieces()
    monkeypatch.setattr(sys, "stderr", pieces)
    monkeypatch.setattr(console, "_quiet", False)
    print_one("a [b] :smile:")
    assert [one for one in pieces.written if one] == [line]
