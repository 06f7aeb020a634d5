"""Places that are no local path: URLs of fsspec's file systems."""

import re
from typing import Any

from srdeploy.errors import UserError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::[^/]*)?://")


def is_url(path: str) -> bool:
    """Whether `path` names a place on another file system, e.g. s3://bucket/folder; file:// is
    local, but a URL, too."""
    return _SCHEME.match(path) is not None


def local_path(url: str) -> str | None:
    """The path in a file:// URL, which is taken as it stands; None for others."""
    scheme, _, rest = url.partition("://")
    return rest if scheme.lower() in ("file", "local") else None


def file_system_of(url: str) -> tuple[Any, str]:
    """(fsspec's file system, the path on it). Raises UserError where there is no such file system,
    its driver is missing, or it can't be reached."""
    try:
        import fsspec
    except ImportError as error:
        raise UserError(
            f"{url} needs fsspec, which is not installed: pip install fsspec"
        ) from error
    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:  # fsspec's own words name the package
        raise UserError(f"{url} needs a driver: {_one_line(error)}") from error
    except Exception as error:  # drivers raise what their libraries raise
        raise UserError(f"{url} can't be opened: {_one_line(error)}") from error
    return system, str(path)


def explain_remote_error(error: Exception) -> str:
    """What a driver says, in one line; drivers raise errors of many libraries."""
    if isinstance(error, FileNotFoundError):
        return "no such file or folder"
    if isinstance(error, PermissionError):
        return f"no permission ({_one_line(error)})"
    if isinstance(error, NotImplementedError):
        return "its file system can't do that"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return _one_line(error)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (text or type(error).__name__)[:300]
