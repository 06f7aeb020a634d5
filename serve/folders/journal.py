"""A local file of lines that only grows, and that a killed process leaves readable."""

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from srdeploy.errors import UserError
from srdeploy.files import explain_os_error
from srdeploy.serve.folders.store import OutputError

CHUNK = 1 << 20
"""Bytes that are read at once."""


class Journal:
    """Lines on disk. A context manager; threads must take turns in `append`.

    Each line is written in one call, so that a process killed at any moment leaves whole lines and
    at most one without its end, which is dropped when the file is opened. It is synced when it is
    closed.
    """

    def __init__(self, path: Path | str, shown: str) -> None:
        """Opens or makes the file, and locks it until it is closed or the process ends. shown: its
        name for messages.

        File systems without locks are done without. Raises UserError where another process has it
        or it is no ordinary file, OutputError where it can't be written.
        """
        self.shown = shown
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:
            if os.path.lexists(path) and not stat.S_ISREG(os.stat(path).st_mode):
                raise UserError(f"{shown} is not an ordinary file: choose another --out")
            self._handle = os.open(path, flags, 0o666)
        except OSError as error:
            raise OutputError(str(explain_os_error(error, shown))) from error
        try:
            self._lock()
            self.length = self._drop_half_line()
        except BaseException:
            os.close(self._handle)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Raises OutputError where the disk did not take all."""
        try:
            try:
                os.fsync(self._handle)
            finally:
                os.close(self._handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # can't be synced
                raise OutputError(str(explain_os_error(error, self.shown))) from error

    def append(self, line: bytes) -> int:
        """Adds a line, which ends with \\n and has no other; returns where it begins. Raises
        OutputError, and the file is as before."""
        start = self.length
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._handle, rest) :]
        except OSError as error:
            os.ftruncate(self._handle, start)
            raise OutputError(str(explain_os_error(error, self.shown))) from error
        self.length += len(line)
        return start

    def clear(self) -> None:
        """Drops all lines. Raises OutputError."""
        try:
            os.ftruncate(self._handle, 0)
        except OSError as error:
            raise OutputError(str(explain_os_error(error, self.shown))) from error
        self.length = 0

    def line_at(self, start: int, length: int) -> bytes:
        """The bytes from `start` on. Raises OutputError."""
        try:
            return os.pread(self._handle, length, start)
        except OSError as error:
            raise OutputError(str(explain_os_error(error, self.shown))) from error

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """(start, line with its end) of each. Raises OutputError."""
        start, rest, place = 0, b"", 0
        while chunk := self.line_at(place, CHUNK):
            place += len(chunk)
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                yield start, line + b"\n"
                start += len(line) + 1

    def _lock(self) -> None:
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another prediction is writing there ({self.shown} is locked): wait for it, or "
                "choose another --out"
            ) from error
        except OSError:
            pass  # e.g. some network file systems: there two runs are the user's to avoid

    def _drop_half_line(self) -> int:
        """Cuts the file after its last line end; returns its length."""
        try:
            length = place = os.fstat(self._handle).st_size
            while place > 0:
                start = max(0, place - CHUNK)
                end = os.pread(self._handle, place - start, start).rfind(b"\n") + 1
                if end > 0:
                    place = start + end
                    break
                place = start
            if place < length:
                os.ftruncate(self._handle, place)
        except OSError as error:
            raise OutputError(str(explain_os_error(error, self.shown))) from error
        return place
