"""The bytes of one photo, wherever it lies."""

import errno
import os
import stat

from srdeploy.errors import UserError
from srdeploy.serve.folders.file_systems import (
    explain_remote_error,
    file_system_of,
    is_url,
    local_path,
)

MAX_BYTES = 2 * 1024**3
"""Larger files are no photos that anyone could decode, and would fill the memory first."""


def read_bytes(path: str, listed: int = 0) -> bytes:
    """The content of the file at `path`, a local path or a URL. listed: bytes that it had when it
    was listed, if known, which saves asking a remote file system.

    Folders, fifos and devices are refused without waiting for them. Raises UserError: the path, a
    colon and a few words.
    """
    place = local_path(path) if is_url(path) else path
    return _read_remote(path, listed) if place is None else _read_local(place, path)


def _read_local(place: str, path: str) -> bytes:
    try:
        # A device may act when it is opened, and a fifo waits: both are told before.
        _check(path, os.stat(place))
        handle = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        with open(handle, "rb", buffering=0) as file:
            _check(path, os.fstat(handle))
            return file.read()
    except ValueError as error:  # a NUL, or text that is no name on any file system
        raise UserError(f"{path}: no name that a file can have") from error
    except OSError as error:
        raise UserError(f"{path}: {_reason(error)}") from error


def _check(path: str, found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise UserError(f"{path}: is a folder")
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path}: not an ordinary file")
    if found.st_size > MAX_BYTES:
        raise UserError(f"{path}: {found.st_size / 1e9:.1f} GB are too many for a photo")


def _reason(error: OSError) -> str:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "no such file"
    if isinstance(error, PermissionError):
        return "no permission to read it: check its owner and mode"
    if error.errno == errno.ELOOP:
        return "its links lead in a circle"
    return f"can't be read ({error.strerror or error})"


def _read_remote(url: str, listed: int) -> bytes:
    system, path = file_system_of(url)
    try:
        size = listed
        if not size:
            found = system.info(path)
            if found.get("type") == "directory":
                raise IsADirectoryError(path)
            size = found.get("size") or 0
        if size > MAX_BYTES:
            raise UserError(f"{url}: {size / 1e9:.1f} GB are too many for a photo")
        return bytes(system.cat_file(path))
    except (UserError, MemoryError):
        raise
    except IsADirectoryError as error:
        raise UserError(f"{url}: is a folder") from error
    except Exception as error:  # see explain_remote_error
        raise UserError(f"{url}: {explain_remote_error(error)}") from error
