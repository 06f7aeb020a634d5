"""Paths as text: for files that every reader of UTF-8 takes, and for messages of one line."""

import os


def as_text(path: str) -> str:
    """The path; bytes that are no UTF-8 (surrogates in Python) as \\xff, so that one odd name does
    not make a file of a million unreadable."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def printable(path: str) -> str:
    """A path on one line, whatever is in its name."""
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in path
    )
