"""Reading a network's inner feature maps without changing it."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from srdeploy.errors import UserError
from srdeploy.outputs import main_logits
from srdeploy.validation import closest

PROBE_SIZE = 64
"""Pixels per side of the image that finds out the taps' channels and strides."""


@dataclass(frozen=True)
class Probe:
    """What one forward showed about a network."""

    channels: tuple[int, ...]
    """Per tap, in the order asked for."""
    strides: tuple[int, ...]
    """Per tap: input pixels per cell."""
    own_channels: dict[str, int]
    """Channels of each of the network's own supervised outputs, "" for the main one."""


@contextmanager
def collected(network: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Collects the outputs of the modules `names` while the block runs the network.

    The dict fills in the order in which the modules ran. A module that runs several times in one
    forward leaves its last output. Hooks exist inside the block only, also when it raises.
    """
    outputs: dict[str, Any] = {}
    with ExitStack() as hooks:
        for name in names:
            module = network.get_submodule(name)
            hooks.enter_context(module.register_forward_hook(partial(_keep, outputs, name)))
        yield outputs


def feature_map(outputs: dict[str, Any], name: str) -> Tensor:
    """The map [N, C, h, w] that module `name` gave; of a tuple its first part. Raises UserError."""
    if name not in outputs:
        raise UserError(
            f"tap '{name}' did not run in the network's forward: name a module that does"
        )
    output = outputs[name]
    found = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(found, Tensor) or found.dim() != 4:
        shape = f" of shape {tuple(found.shape)}" if isinstance(found, Tensor) else ""
        raise UserError(
            f"tap '{name}' gives {type(found).__name__}{shape}: exits read maps [N, C, H, W]"
        )
    return found


def find_taps(network: nn.Module, taps: str | Sequence[str]) -> tuple[str, ...]:
    """The names of the modules to read, shallow to deep: `taps`, or for "auto" the `stages`.

    Raises UserError for a name that the network lacks, listing close ones, for a name given twice,
    and for "auto" on a network without stages.
    """
    known = [name for name, _ in network.named_modules() if name]
    if isinstance(taps, str):
        if taps != "auto":
            raise UserError(f"taps is '{taps}': give \"auto\" or a list of module names")
        stages = getattr(network, "stages", None)
        if not isinstance(stages, tuple | list) or not stages:
            parts = ", ".join(name for name, _ in network.named_children())
            raise UserError(
                f"{type(network).__name__} names no stages: pass taps=[...] with module names, "
                f"shallow to deep; its parts are {parts}"
            )
        taps = list(stages)
    if not taps:
        raise UserError("taps is empty: name at least one module")
    for name in taps:
        if name not in known:
            # Dozens of names would bury the message: the direct parts stand for the rest.
            near = closest(name, known)
            if not near.startswith("did"):
                near = closest(name, [part for part, _ in network.named_children()])
            raise UserError(f"{type(network).__name__} has no module '{name}' to tap: {near}")
    if len(set(taps)) != len(taps):
        raise UserError(f"taps must differ from each other, not {', '.join(taps)}")
    return tuple(taps)


def probe(network: nn.Module, taps: Sequence[str], own_exits: Sequence[str]) -> Probe:
    """Runs the network once on a blank image and reports its taps; nothing of it changes.

    It runs in evaluation mode without gradients, so running statistics stay, and each module gets
    its own mode back. Raises UserError for taps that can't be read or do not run shallow to deep.
    """
    parameter = next(network.parameters(), torch.empty(0))
    blank = torch.zeros(
        1, 3, PROBE_SIZE, PROBE_SIZE, device=parameter.device, dtype=parameter.dtype
    )
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.no_grad(),
            collected(network, (*taps, *own_exits)) as outputs,
        ):
            logits = main_logits(network(blank))
    finally:
        for module, mode in modes:
            module.training = mode
    maps = [feature_map(outputs, name) for name in taps]
    ran = [name for name in outputs if name in taps]
    if ran != list(taps):
        raise UserError(
            f"taps must be named in the order they run, shallow to deep: {', '.join(ran)}"
        )
    own = {name: feature_map(outputs, name).shape[1] for name in own_exits}
    return Probe(
        channels=tuple(found.shape[1] for found in maps),
        strides=tuple(max(1, round(PROBE_SIZE / found.shape[2])) for found in maps),
        own_channels={"": logits.shape[1], **own},
    )


def _keep(outputs: dict[str, Any], name: str, _module: nn.Module, _args: Any, output: Any) -> None:
    outputs.pop(name, None)  # a later output stands at its own place in the order
    outputs[name] = output
