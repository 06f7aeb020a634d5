"""Outputs on a remote file system, by fsspec."""

import posixpath
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from srdeploy.errors import UserError
from srdeploy.serve.folders.file_systems import explain_remote_error, file_system_of
from srdeploy.serve.folders.partial_names import PartialNames, is_partial
from srdeploy.serve.folders.store import OutputError
from srdeploy.serve.folders.text import printable

WHOLE_PUTS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "oci", "memory"})
"""File systems whose files appear once they are complete, and that have no folders to be made."""
FOLDERS = 10_000
"""Folders that are remembered as made, at most; it bounds the memory."""


class RemoteStore:
    """See Store. Object stores take files whole; elsewhere they are written under another name and
    moved."""

    def __init__(self, root: str) -> None:
        """Raises UserError where the file system's driver is missing, or `root` is a file."""
        self.root = root
        self._system, self._folder = file_system_of(root)
        self._folder = self._folder.rstrip("/")
        protocol = self._system.protocol
        names = {protocol} if isinstance(protocol, str) else set(protocol)
        self._puts_whole = not names.isdisjoint(WHOLE_PUTS)
        self._names = PartialNames()
        self._made: set[str] = set()
        try:
            a_file = self._system.isfile(self._folder)
        except Exception as error:  # drivers raise what their libraries raise
            raise self._explained(error, "") from error
        if a_file:
            raise UserError(
                f"{printable(root)} is a file, a folder is to be written there: choose another"
            )

    def write(self, path: str, content: bytes) -> None:
        """See Store."""
        self._whole(path, lambda place: self._system.pipe_file(place, content))

    def write_file(self, path: str, source: Path) -> None:
        """See Store."""
        self._whole(path, lambda place: self._system.put_file(str(source), place))

    def read_file(self, path: str, target: Path) -> bool:
        """Fetches a file to the local `target`; False where there is none. Raises OutputError."""
        place = self._place(path)
        try:
            self._system.invalidate_cache(posixpath.dirname(place))
            if not self._system.exists(place):
                return False
            self._system.get_file(place, str(target))
        except Exception as error:
            raise self._explained(error, path) from error
        return True

    def size(self, path: str) -> int | None:
        """See Store."""
        try:
            found: dict[str, Any] = self._system.info(self._place(path))
        except FileNotFoundError:
            return None
        except Exception as error:
            raise self._explained(error, path) from error
        return found["size"] if found["type"] == "file" else None

    def sizes(self) -> Iterator[tuple[str, int]]:
        """(path, bytes) of all files, folder by folder: asking for a million one by one takes a
        night. What writes that were killed have left is removed: call it while no other process
        writes here. Raises OutputError."""
        try:
            self._system.invalidate_cache()  # other processes may have written here
            for folder, _, files in self._system.walk(self._folder, detail=True):
                below = str(folder).strip("/")[len(self._folder.strip("/")) :].strip("/")
                for name, found in files.items():
                    if is_partial(name):
                        with suppress(Exception):
                            self._system.rm_file(f"{folder}/{name}")
                        continue
                    yield (f"{below}/{name}" if below else name), int(found.get("size") or 0)
        except FileNotFoundError:
            return
        except Exception as error:
            raise self._explained(error, "") from error
        finally:
            self._system.invalidate_cache()  # drivers remember a kilobyte for each file

    def _whole(self, path: str, put: Callable[[str], object]) -> None:
        target = self._place(path)
        try:
            if self._puts_whole:
                put(target)
                return
            folder = posixpath.dirname(target)
            if folder not in self._made:
                self._system.makedirs(folder, exist_ok=True)
                if len(self._made) >= FOLDERS:
                    self._made.clear()
                self._made.add(folder)
            temporary = f"{folder}/{self._names.next()}"
            try:
                put(temporary)
                self._move(temporary, target)
            except BaseException:
                with suppress(Exception):
                    self._system.rm_file(temporary)
                raise
        except Exception as error:
            raise self._explained(error, path) from error

    def _move(self, temporary: str, target: str) -> None:
        """Some file systems do not move onto a file that is there."""
        try:
            self._system.mv(temporary, target)
        except OSError:
            if not self._system.isfile(target):
                raise
            self._system.rm_file(target)
            self._system.mv(temporary, target)

    def _place(self, path: str) -> str:
        return f"{self._folder}/{path}"

    def _explained(self, error: Exception, path: str) -> UserError:
        place = printable(f"{self.root.rstrip('/')}/{path}" if path else self.root)
        if isinstance(error, FileExistsError | IsADirectoryError | NotADirectoryError):
            return UserError(f"{place}: a file or folder of that name is in the way")
        if isinstance(error, FileNotFoundError):
            return OutputError(f"{place}: no such bucket or folder, make it first")
        return OutputError(f"{place}: {explain_remote_error(error)}")
