"""Paths as text that every reader of UTF-8 takes."""

import os


def as_text(path: str) -> str:
    """The path; bytes that are no UTF-8 (surrogates in Python) as \\xff, so that one odd name does
    not make a file of a million unreadable."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
