"""Where outputs go: a local folder, or one on a remote file system."""

from pathlib import Path
from typing import Protocol

from srdeploy.errors import UserError


class OutputError(UserError):
    """The output folder can't take a file for a reason that the next photo will meet, too: a full
    disk, no permission, a remote side that is gone. It ends the job; what was written is whole."""


class Store(Protocol):
    """An output folder. Paths are relative to it, with /. Threads may use it at once."""

    root: str
    """As people gave it, for messages."""

    def write(self, path: str, content: bytes) -> None:
        """The file appears whole, and replaces an older one. It is not synced: a million waits for
        the disk take hours. Raises OutputError; UserError where the path alone is at fault (its
        name is too long for the file system, a folder of that name is there)."""

    def write_file(self, path: str, source: Path) -> None:
        """`write` with the content of a local file, which may be larger than the memory. Raises as
        `write`."""

    def size(self, path: str) -> int | None:
        """Bytes of a file, None where there is none. Raises OutputError."""
