"""EMA: a moving average of network and exits over the steps, often steadier than the last weights
(Polyak and Juditsky, 1992)."""

import hashlib
import json
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from srdeploy.data import DataSet
from srdeploy.errors import UserError
from srdeploy.files import explain_os_error, whole_file
from srdeploy.models.weights import save_weights
from srdeploy.runs import EXITS, STATE, WEIGHTS
from srdeploy.train.regulation import SelfRegulation


class EMA:
    """A float32 shadow of a module's parameters and buffers, as of when it was made.

    Normalisation's statistics are averaged along, so that they fit the weights beside them; what is
    no floating-point number (a count of batches, say) is the latest.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        """decay: share of the old average that stays in a step, 0..1, once it has seen enough
        steps."""
        self.decay = decay
        self._module = module
        self.shadow = {
            name: tensor.detach().to(torch.float32 if tensor.is_floating_point() else None).clone()
            for name, tensor in _tensors(module).items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after step number `step`, counted from 1.

        The first steps stay less long, min(decay, (1 + step) / (10 + step)): the random start would
        otherwise last for 1 / (1 - decay) steps.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        shadows: list[Tensor] = []
        latest: list[Tensor] = []
        for name, tensor in _tensors(self._module).items():
            if tensor.is_floating_point():
                shadows.append(self.shadow[name])
                latest.append(tensor.detach().float())
            else:
                self.shadow[name].copy_(tensor)
        # All tensors in a few kernels, where the device can.
        get_ema_multi_avg_fn(decay)(shadows, latest, step)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Puts the average into the module while the block runs, then its own weights back, bit for
        bit."""
        tensors = _tensors(self._module)
        own = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        try:
            _fill(tensors, self.shadow)
            yield
        finally:
            _fill(tensors, own)

    def load(self, shadow: Mapping[str, Tensor]) -> None:
        """Continues from a saved `shadow`. Raises KeyError and RuntimeError where it does not
        fit."""
        if shadow.keys() != self.shadow.keys():
            odd = sorted(shadow.keys() ^ self.shadow.keys())
            raise KeyError(f"the average's tensors are others: {odd[0]}")
        _fill(self.shadow, shadow)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """What is saved of a module, by name, without what is no tensor (a module's extra state)."""
    return {n: value for n, value in module.state_dict().items() if isinstance(value, Tensor)}


@torch.no_grad()
def _fill(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(values[name])


# state.pt: everything that a run needs to resume exactly, in one file that appears
# whole.

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
"""The keys of every state.pt."""


@dataclass
class Progress:
    """How far a run is: steps done, and its best validation so far (step 0: none yet)."""

    step: int = 0
    best_miou: float | None = None
    best_step: int = 0


def items_digest(dataset: DataSet) -> str:
    """A digest of the split's photo names in order: the stream of samples depends on them."""
    names = "\n".join(item.name for item in dataset.items)
    # Names come from the disk as they are: some are no UTF-8.
    return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()[:16]


def save_state(
    folder: Path,
    regulated: SelfRegulation,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    items: str,
    ema: EMA | None = None,
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
        "ema": None if ema is None else ema.shadow,
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
    ema: EMA | None = None,
) -> Progress:
    """Puts state.pt into the network, exits, optimizer, EMA and torch's random numbers; returns
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
        if ema is not None:
            ema.load(state.get("ema") or {})
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
