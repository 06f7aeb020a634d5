"""Where outputs go: a local folder, or one on a remote file system."""

import errno
import itertools
import os
import posixpath
import re
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from srdeploy import console
from srdeploy.errors import UserError
from srdeploy.files import explain_os_error
from srdeploy.serve.folders.paths import (
    explain_remote_error,
    file_system_of,
    is_url,
    local_path,
    printable,
)

WHOLE_PUTS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "oci", "memory"})
"""File systems whose files appear only when complete, and that need no folders."""
FOLDERS = 10_000
"""Most folders remembered as created; it bounds the memory."""
EVERY_S = 30.0
"""Seconds between two uploads, at least."""
SHARE = 20
"""An upload that took a second is followed by the next after this many: the file of a million
photos has hundreds of MB."""
_PARTIAL = re.compile(r"\.srdeploy\.[0-9a-f]{12}\.[0-9a-f]+\.part|\.cluster\.[0-9a-f]{8}\.part")
"""The second kind are the marks of cluster jobs; see ray_executor."""
_NAMES_FAULT = {
    errno.ENAMETOOLONG: "the name is too long for the file system of the output",
    errno.EISDIR: "a folder of that name is in the way",
    errno.EEXIST: "a file is where its folder should be",
    errno.ENOTDIR: "a file is where its folder should be",
    errno.EILSEQ: "the file system of the output does not take such names",
    errno.EINVAL: "the file system of the output does not take such names",
    errno.ELOOP: "links there lead in a circle",
}
"""Errors that concern only one path, and their messages."""


class OutputError(UserError):
    """The output folder can't take a file for a reason that affects the next photo, too: a full
    disk, no permission, a remote side that is gone. It ends the job; written files are whole."""


class Store(Protocol):
    """An output folder. Paths are relative to it, with /. Threads may use it at once."""

    root: str
    """The folder as given, for messages."""

    def write(self, path: str, content: bytes) -> None:
        """The file appears whole, and replaces an older one. It is not synced: a million syncs
        take hours. Raises OutputError; UserError if only this path is at fault (its name is
        too long for the file system, a folder of that name exists)."""

    def write_file(self, path: str, source: Path) -> None:
        """`write` with the content of a local file, which may be larger than the memory. Raises as
        `write`."""

    def size(self, path: str) -> int | None:
        """Bytes of a file, None where there is none. Raises OutputError."""


def open_store(out: str) -> Store:
    """The folder or URL `out`; nothing is written yet. Raises UserError where it is a file, or no
    driver for its file system is installed."""
    local = local_path(out) if is_url(out) else out
    if local is not None:
        return LocalStore(local)

    return RemoteStore(out)


class LocalStore:
    """See Store. Files are made beside their place under a short name, and moved there."""

    def __init__(self, root: str) -> None:
        """Raises UserError where `root` is empty, or there and no folder."""
        if not root:
            raise UserError("--out is empty: name a folder, or give . for the current one")
        self.root = root
        self.folder = os.path.abspath(root)
        self._names = TemporaryNames()
        self._made: set[str] = set()
        if os.path.lexists(self.folder) and not os.path.isdir(self.folder):
            raise UserError(
                f"{printable(root)} is a file, a folder is to be written there: choose another"
            )

    def write(self, path: str, content: bytes) -> None:
        """See Store."""
        self._whole(path, partial(_fill, content))

    def write_file(self, path: str, source: Path) -> None:
        """See Store."""
        self._whole(path, partial(shutil.copyfile, source))

    def size(self, path: str) -> int | None:
        """See Store."""
        try:
            found = os.stat(os.path.join(self.folder, path))
        except OSError as error:
            if isinstance(error, FileNotFoundError) or error.errno in _NAMES_FAULT:
                return None
            raise OutputError(str(explain_os_error(error, self._shown(path)))) from error
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def make_folder(self) -> None:
        """Raises OutputError where `root` can't be made."""
        try:
            os.makedirs(self.folder, exist_ok=True)
        except OSError as error:
            raise OutputError(str(explain_os_error(error, printable(self.root)))) from error

    def remove_leftovers(self) -> None:
        """Removes what writes that were killed have left. Call it while no other process writes
        here."""
        folders = [self.folder]
        while folders:
            with suppress(OSError), os.scandir(folders.pop()) as entries:
                for entry in entries:  # one by one: a folder may hold a million
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    elif is_partial(entry.name):
                        with suppress(OSError):
                            os.unlink(entry.path)

    def _whole(self, path: str, make: Callable[[str], object]) -> None:
        """`make` gets a temporary path, which then takes its place."""
        target = os.path.join(self.folder, path)
        try:
            try:
                self._make(target, make)
            except FileNotFoundError:  # somebody removed the folder, or the temporary file
                self._made.clear()
                self._make(target, make)
        except OSError as error:
            fault = _NAMES_FAULT.get(error.errno or 0)
            if fault is not None:
                raise UserError(f"{self._shown(path)}: {fault}") from error
            raise OutputError(str(explain_os_error(error, self._shown(path)))) from error

    def _make(self, target: str, make: Callable[[str], object]) -> None:
        folder = os.path.dirname(target)
        if folder not in self._made:
            os.makedirs(folder, exist_ok=True)
            if len(self._made) >= FOLDERS:
                self._made.clear()
            self._made.add(folder)
        temporary = f"{folder}/{self._names.next()}"
        try:
            make(temporary)
            os.replace(temporary, target)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise

    def _shown(self, path: str) -> str:
        return printable(os.path.join(self.root, path))


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
        self._names = TemporaryNames()
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
        """Some file systems do not move onto an existing file."""
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


class PeriodicUpload:
    """A context manager; once it has begun, the copy is complete when it is left."""

    def __init__(self, store: RemoteStore, path: str, source: Path) -> None:
        """path: in the store; source: the local file, to which others append."""
        self._store = store
        self._path = path
        self._source = source
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._uploaded = -1
        self._took = 0.0

    def __enter__(self) -> Self:
        return self

    def begin(self) -> None:
        """Uploads for the first time, and from now on. Raises OutputError."""
        self._renew()
        self._thread = threading.Thread(target=self._keep, name="manifest-upload", daemon=True)
        self._thread.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Raises OutputError, unless another exception is already being raised."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        try:
            self._renew()
        except OutputError as failure:
            if kind is None:
                raise
            console.warn(f"the manifest could not be written: {failure}")

    def _keep(self) -> None:
        while not self._stop.wait(max(EVERY_S, SHARE * self._took)):
            with suppress(OutputError):  # where it lasts, the outputs or the last upload fail, too
                self._renew()

    def _renew(self) -> None:
        length = self._source.stat().st_size
        if length == self._uploaded:
            return
        begun = time.monotonic()
        self._store.write_file(self._path, self._source)
        self._took = time.monotonic() - begun
        self._uploaded = length


class TemporaryNames:
    """Short names, whatever the file is to be called, that no other process on any machine
    makes."""

    def __init__(self) -> None:
        self._token = secrets.token_hex(6)
        self._count = itertools.count()

    def next(self) -> str:
        """A new one. Threads may ask at once."""
        return f".srdeploy.{self._token}.{next(self._count):x}.part"


def is_partial(name: str) -> bool:
    """Whether a file of that name is a leftover of a killed write, if none is in progress."""
    return _PARTIAL.fullmatch(name) is not None


def _fill(content: bytes, path: str) -> None:
    """Writes a new file."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(handle, rest) :]
    finally:
        os.close(handle)  # where some file systems tell that they are full
