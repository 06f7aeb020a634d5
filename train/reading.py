"""How a network is read before it is trained: taps and why, heads of its own, auxiliary heads, the
form of its output."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from srdeploy.models.auxiliary import AuxiliaryHead, find_auxiliary
from srdeploy.models.cost import count_parameters
from srdeploy.models.tracing import PROBE_SIZE, blank, trace, undisturbed
from srdeploy.outputs import main_logits
from srdeploy.train.regulation import DEFAULTS, SelfRegulation
from srdeploy.train.regulation_config import RegulationConfig
from srdeploy.train.taps import TapChoice


@dataclass(frozen=True)
class OutputForm:
    """What the network's forward gives, and where the main logits are in it."""

    kind: str
    """In words, e.g. "a dict with 'out' and 'aux'; its 'out' holds the logits"."""
    classes: int
    """Channels of the main logits."""
    grid: tuple[int, int]
    """(h, w) of the main logits for an image of the probe's size."""


@dataclass(frozen=True)
class NetworkReading:
    """How self-regulation, and then the exporter, would take a network."""

    kind: str
    """The network's class."""
    size: tuple[int, int]
    """(H, W) of the image on which it was read."""
    choice: TapChoice
    own_exits: dict[str, float]
    """Heads that training supervises: module -> weight of its loss."""
    own_parameters: dict[str, int]
    """Module -> numbers in its parameters, of the same heads."""
    auxiliary: tuple[AuxiliaryHead, ...]
    """Heads that the main logits do not depend on: left out of what is deployed."""
    output: OutputForm


def read_network(
    network: nn.Module,
    classes: int,
    taps: str | Sequence[str] = "auto",
    settings: RegulationConfig = DEFAULTS,
    size: tuple[int, int] = PROBE_SIZE,
) -> NetworkReading:
    """Reads a network on blank images of `size` (H, W); nothing of it changes.

    Raises UserError where it can't take that size, gives another number of classes, or has no
    modules to tap.
    """
    # A baseline is read as if it had exits.
    settings = settings.model_copy(update={"enabled": True})
    regulated = SelfRegulation(network, classes, taps=taps, settings=settings, probe_size=size)
    assert regulated.choice is not None
    logits = trace(network, size).logits
    with undisturbed(network), torch.no_grad():
        output = network(blank(network, size))
    return NetworkReading(
        kind=type(network).__name__,
        size=size,
        choice=regulated.choice,
        own_exits=dict(regulated.own_exits),
        own_parameters={
            name: count_parameters(network.get_submodule(name)) for name in regulated.own_exits
        },
        auxiliary=find_auxiliary(network, size),
        output=OutputForm(describe_output(output), logits[1], (logits[2], logits[3])),
    )


def describe_output(output: Any) -> str:
    """The form of a network's output in words, and which part `main_logits` takes of it."""
    logits = main_logits(output)
    if isinstance(output, Tensor):
        return "a tensor of logits"
    kind = "a dict" if type(output) is dict else f"a {type(output).__name__}"
    if isinstance(output, Mapping):
        held = next((str(key) for key, value in output.items() if value is logits), None)
        listed = f"{kind} with {' and '.join(repr(str(key)) for key in output)}"
        told = held is None or len(output) == 1
        return listed if told else f"{listed}; the logits are its {held!r}"
    if isinstance(output, tuple | list):
        return f"{kind} of {len(output)}, of which the first part holds the logits"
    return f"{kind}; the logits are its .logits"
