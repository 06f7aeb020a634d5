"""Lists of paths, one a line or ended by zero bytes, of any length."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from srdeploy.errors import UserError
from srdeploy.files import explain_os_error
from srdeploy.serve.folders.text import printable

CHUNK = 1 << 16
LONGEST = 1 << 16
"""Bytes of a path; the systems that we know take 4096."""


@contextmanager
def open_list(path: str) -> Iterator[BinaryIO]:
    """A list file or a pipe. Raises UserError where it can't be opened, or never ends."""
    try:
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
            raise UserError(
                f"{printable(path)} is no ordinary file: give a text file with one path a line"
            )
        file = open(path, "rb")  # noqa: SIM115  closed below; reading it raises elsewhere
    except (OSError, ValueError) as error:
        raise _explained(error, path) from error
    with file:
        yield file


def listed_paths(file: BinaryIO, name: str) -> Iterator[str]:
    """The paths in `file`, empty lines left out; what is too long for a path is cut, so that it
    is told as absent. Raises UserError where it can't be read."""
    try:
        yield from map(os.fsdecode, filter(None, _entries(file)))
    except OSError as error:
        raise _explained(error, name) from error


def _entries(file: BinaryIO) -> Iterator[bytes]:
    chunk = file.read(CHUNK).removeprefix(b"\xef\xbb\xbf")  # Windows editors write a mark
    separator = b"\0" if b"\0" in chunk else b"\n"
    rest = b""
    while chunk:
        *whole, last = chunk.split(separator)
        if whole:
            whole[0] = rest + whole[0]
            rest = last
        else:
            rest += last
        yield from (_trimmed(one, separator) for one in whole)
        rest = rest[:LONGEST]
        chunk = file.read(CHUNK)
    yield _trimmed(rest, separator)


def _trimmed(entry: bytes, separator: bytes) -> bytes:
    return entry.removesuffix(b"\r") if separator == b"\n" else entry


def _explained(error: OSError | ValueError, path: str) -> UserError:
    if isinstance(error, OSError):
        return explain_os_error(error, printable(path))
    return UserError(f"{printable(path)}: not a path")
