"""TensorRT's timing cache on disk: what kernels took on this GPU."""

from pathlib import Path
from typing import Any

from srdeploy.errors import UserError
from srdeploy.files import explain_os_error, write_whole


def attach_timing_cache(config: Any, path: Path | None) -> Any:
    """The cache in `path`, or an empty one where there is no such file, attached to `config`; None
    for no path.

    Raises UserError where it was measured on another GPU or version, whose timings mislead.
    """
    if path is None:
        return None
    try:
        stored = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise explain_os_error(error, path) from error
    cache = config.create_timing_cache(stored)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise UserError(
            f"{path} is no timing cache of this TensorRT on this GPU: give another --timing-cache"
        )
    return cache


def save_timing_cache(cache: Any, path: Path) -> None:
    """Writes it whole."""
    write_whole(path, bytes(cache.serialize()))
