"""Files that appear whole or not at all, their digests, and readers whose errors name the file."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from srdeploy.errors import UserError


def explain_os_error(error: OSError, path: Path | str) -> UserError:
    """One line for a failed read or write of `path`, with what to do about it."""
    if error.errno == errno.ENOSPC:
        return UserError(
            f"no space left on the device while writing {path}: free some space, then run again"
        )
    if error.errno == errno.EDQUOT:
        return UserError(
            f"the disk quota is used up while writing {path}: free some space, then run again"
        )
    if error.errno == errno.EROFS:
        return UserError(f"{path} is on a file system that takes no writes: choose another place")
    if error.errno == errno.EFBIG:
        return UserError(f"{path} is larger than the file system or the limit of this user allows")
    if isinstance(error, FileNotFoundError):
        return UserError(f"no such file or folder: {path}")
    if isinstance(error, PermissionError):
        return UserError(f"no permission for {path}: check its owner and mode")
    return UserError(f"{path}: {error.strerror or error}")


@contextmanager
def whole_file(path: Path, sync: bool = True) -> Iterator[Path]:
    """Yields a temporary path beside `path` to write into, and moves it there when the block
    ends well.

    When the block raises, nothing is left behind and an older `path` stays as it was. sync: waits
    until the disk has it, so that it is whole even after a power cut; a process that is killed
    leaves whole files either way.
    Raises UserError where the folder can't be made or the disk is full.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_file():
        # As root, replacing /dev/null or /dev/stdout would break the machine.
        raise UserError(f"{path} is not an ordinary file: choose another name")
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.", suffix=f".part{path.suffix}"
        )
        os.close(handle)
        temporary = Path(name)
        yield temporary
        # mkstemp makes files that only the owner reads; published files get the usual mode.
        os.chmod(temporary, 0o666 & ~_umask())
        if sync:
            with temporary.open("rb+") as written:
                os.fsync(written.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise explain_os_error(error, _blamed(error, path)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path` to fill; when the block ends well it replaces `path`.

    A folder that stood at `path` before is removed only after the new one is complete.
    Raises UserError where `path` is a file, can't be made, or the disk is full.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file, a folder is to be written there: choose another name")
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        if path.exists():
            aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
            os.replace(path, aside)
            os.replace(temporary, path)
            shutil.rmtree(aside)
        else:
            os.replace(temporary, path)
    except OSError as error:
        raise explain_os_error(error, _blamed(error, path)) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def write_whole(path: Path, content: bytes | str, sync: bool = True) -> None:
    """Writes `content` (text as UTF-8) to `path` in one step: readers see the old file or the
    new one. sync: see whole_file."""
    with whole_file(path, sync) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON with a final newline; NaN and infinity are refused."""
    write_whole(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_text(path: Path) -> str:
    """The text of `path`. Raises UserError where it is absent, unreadable or not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # Windows editors write a mark
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a UTF-8 text file") from error
    except OSError as error:
        raise explain_os_error(error, path) from error


def read_json(path: Path, object_as: Callable[[list[tuple[str, Any]]], Any] = dict) -> Any:
    """The JSON value in `path`. `object_as` makes each object from its pairs of key and value.

    Raises UserError with the line where it does not parse.
    """
    try:
        return json.loads(read_text(path), object_pairs_hook=object_as)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON (line {error.lineno}: {error.msg})") from error


def sha256_of(path: Path) -> str:
    """The file's SHA-256 as 64 hexadecimal digits. Raises UserError where it can't be read."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise explain_os_error(error, path) from error


def _blamed(error: OSError, path: Path) -> Path | str:
    """The file to name: the one that the error is about, but never a temporary one of ours."""
    about = os.fspath(error.filename) if isinstance(error.filename, str | Path) else ""
    ours = about.startswith(str(path.parent / f".{path.name}."))
    return path if ours or not about else about


@cache  # asking for it sets it for a moment, which threads would notice
def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
