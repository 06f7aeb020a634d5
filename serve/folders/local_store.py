"""Outputs in a local folder."""

import errno
import os
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from srdeploy.errors import UserError
from srdeploy.files import explain_os_error
from srdeploy.serve.folders.file_systems import is_url, local_path
from srdeploy.serve.folders.partial_names import PartialNames, is_partial
from srdeploy.serve.folders.store import OutputError, Store
from srdeploy.serve.folders.text import printable

FOLDERS = 10_000
"""Folders that are remembered as made, at most; it bounds the memory."""

_NAMES_FAULT = {
    errno.ENAMETOOLONG: "the name is too long for the file system of the output",
    errno.EISDIR: "a folder of that name is in the way",
    errno.EEXIST: "a file is where its folder should be",
    errno.ENOTDIR: "a file is where its folder should be",
    errno.EILSEQ: "the file system of the output does not take such names",
    errno.EINVAL: "the file system of the output does not take such names",
    errno.ELOOP: "links there lead in a circle",
}
"""What is wrong with one path only, and in its words."""


def open_store(out: str) -> Store:
    """The folder or URL `out`; nothing is written yet. Raises UserError where it is a file, or no
    driver for its file system is there."""
    local = local_path(out) if is_url(out) else out
    if local is not None:
        return LocalStore(local)
    from srdeploy.serve.folders.remote_store import RemoteStore

    return RemoteStore(out)


class LocalStore:
    """See Store. Files are made beside their place under a short name, and moved there."""

    def __init__(self, root: str) -> None:
        """Raises UserError where `root` is empty, or there and no folder."""
        if not root:
            raise UserError("--out is empty: name a folder, or give . for the current one")
        self.root = root
        self.folder = os.path.abspath(root)
        self._names = PartialNames()
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


def _fill(content: bytes, path: str) -> None:
    """Writes a new file."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(handle, rest) :]
    finally:
        os.close(handle)  # where some file systems tell that they are full
