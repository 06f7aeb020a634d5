"""state.pt: everything that a run needs to go on exactly where it was, in one file that appears
whole."""

import hashlib
import json
import pickle
import warnings
import zipfile
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from srdeploy.data import DataSet
from srdeploy.errors import UserError
from srdeploy.files import explain_os_error, whole_file
from srdeploy.models.weights import save_weights
from srdeploy.runs import EXITS, STATE, WEIGHTS
from srdeploy.train.average import Average
from srdeploy.train.regulation import SelfRegulation

METADATA_KEY = "srdeploy.best"
"""Key in the weight files' metadata: JSON of the step and the val mIoU (0..1) they are from."""
FORMAT = 2
"""Version of state.pt: 2 added "ema"."""
READABLE = (1, 2)
"""Versions that are read."""
KEYS = {
    *("format", "step", "network", "exits", "optimizer", "rng", "cuda_rng"),
    *("best_miou", "best_step", "items"),
}
"""What every state.pt holds."""


@dataclass
class Progress:
    """How far a run is: steps done, and its best validation so far (step 0: none yet)."""

    step: int = 0
    best_miou: float | None = None
    best_step: int = 0


def items_digest(dataset: DataSet) -> str:
    """Of the split's photo names in order: the stream of samples depends on them."""
    names = "\n".join(item.name for item in dataset.items)
    # Names come from the disk as they are: some are no UTF-8.
    return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()[:16]


def save_state(
    folder: Path,
    regulated: SelfRegulation,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    items: str,
    average: Average | None = None,
) -> None:
    """Writes state.pt. The old one stays until the new one is whole; raises UserError (full
    disk)."""
    on_cuda = any(parameter.is_cuda for parameter in regulated.network.parameters())
    state = {
        "format": FORMAT,
        "step": progress.step,
        "network": regulated.network.state_dict(),
        "exits": None if regulated.exits is None else regulated.exits.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state() if on_cuda else None,
        "best_miou": progress.best_miou,
        "best_step": progress.best_step,
        "items": items,
        "ema": None if average is None else average.shadow,
    }
    write_state(folder / STATE, state)


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint whole. Raises UserError (full disk)."""
    with whole_file(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:
            # torch's zip writer reports a failed write so, without an errno.
            raise UserError(
                f"{path}: could not be written ({_first_line(error)}): is the disk full?"
            ) from error


def load_state(
    folder: Path,
    regulated: SelfRegulation,
    optimizer: torch.optim.Optimizer,
    items: str,
    average: Average | None = None,
) -> Progress:
    """Puts state.pt into the network, exits, optimizer, average and torch's random numbers; returns
    how far it was.

    Raises UserError where the file is truncated, of another network, or of another list of photos.
    """
    path = folder / STATE
    state = read_state(path)
    if state["items"] != items:
        raise UserError(
            f"{path}: the training split holds other photos than when the run began: "
            "restore them, or start a new run with another --out"
        )
    try:
        regulated.network.load_state_dict(state["network"])
        if regulated.exits is not None:
            regulated.exits.load_state_dict(state["exits"])
        optimizer.load_state_dict(state["optimizer"])
        if average is not None:
            average.load(state.get("ema") or {})
    except (RuntimeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path}: does not fit this network ({_first_line(error)}): was it written by another "
            "version?"
        ) from error
    torch.set_rng_state(state["rng"])
    on_cuda = any(parameter.is_cuda for parameter in regulated.network.parameters())
    if on_cuda and state["cuda_rng"] is not None:
        torch.cuda.set_rng_state(state["cuda_rng"])
    return Progress(step=state["step"], best_miou=state["best_miou"], best_step=state["best_step"])


def read_state(path: Path, keys: Set[str] = KEYS) -> dict[str, Any]:
    """The content of a state.pt, tensors on the CPU. Raises UserError where it is broken or lacks
    one of `keys`."""
    remedy = "restore it from a backup, or start over with --force"
    try:
        path.open("rb").close()
    except OSError as error:
        raise explain_os_error(error, path) from error
    try:
        with warnings.catch_warnings():
            # A file cut short may look like one of torch's old formats, on which torch comments.
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        OSError,  # torch seeks before the beginning of a file that was cut short
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        raise UserError(f"{path}: truncated or not a checkpoint of srdeploy: {remedy}") from error
    if not isinstance(state, dict) or not state.keys() >= keys:
        raise UserError(f"{path}: not a checkpoint of srdeploy: {remedy}")
    if state["format"] not in READABLE:
        raise UserError(
            f"{path}: format {state['format']}, but this version reads {READABLE}: {remedy}"
        )
    return state


def save_best(folder: Path, regulated: SelfRegulation, progress: Progress) -> None:
    """Writes network.safetensors, the plain network, and exits.safetensors where there are
    exits."""
    assert progress.best_miou is not None
    # One key: safetensors writes several in an order of its own, and equal runs have equal files.
    best = {"step": progress.best_step, "miou": progress.best_miou}
    metadata = {METADATA_KEY: json.dumps(best)}
    if regulated.exits is not None:
        save_weights(regulated.exits, folder / EXITS, metadata)
    save_weights(regulated.network, folder / WEIGHTS, metadata)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[min(1, len(lines) - 1)] if lines else type(error).__name__
