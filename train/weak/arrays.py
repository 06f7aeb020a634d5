"""Arrays of one photo in one .npz file, which appears whole."""

import zipfile
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from srdeploy.errors import UserError
from srdeploy.files import whole_file


def write_arrays(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Writes `arrays`, compressed. Raises UserError (full disk)."""
    # Not synced to the disk: what is lost in a power cut is made again.
    with whole_file(path, sync=False) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def read_arrays(path: Path, names: Set[str]) -> dict[str, npt.NDArray[Any]]:
    """The arrays `names` of a file. Raises UserError where it is broken or lacks one."""
    try:
        # Opened here: numpy leaves a file open that it can't read.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
            return {name: found[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: absent or broken: remove it and run again") from error
