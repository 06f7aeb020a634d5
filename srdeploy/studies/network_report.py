"""How a network is read before it is trained: taps and why, heads of its own, auxiliary heads, the
form of its output."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from srdeploy.errors import UserError
from srdeploy.models import NETWORKS, make_network
from srdeploy.models.auxiliary import AuxiliaryHead, find_auxiliary
from srdeploy.models.cost import count_parameters
from srdeploy.models.tracing import PROBE_SIZE, blank, trace, undisturbed
from srdeploy.outputs import main_logits
from srdeploy.runs import build_network, is_run, open_run
from srdeploy.studies.with_exits import regulation_of
from srdeploy.train.exits import TapChoice
from srdeploy.train.regulation import DEFAULTS, SelfRegulation
from srdeploy.train.regulation_config import RegulationConfig
from srdeploy.validation import closest, parse_options, parse_size


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
    auxiliary_heads: dict[str, float]
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
        auxiliary_heads=dict(regulated.auxiliary_heads),
        own_parameters={
            name: count_parameters(network.get_submodule(name))
            for name in regulated.auxiliary_heads
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


# What `srdeploy inspect TARGET` shows without photos: how self-regulation and export take a
# network.

if TYPE_CHECKING:
    from rich.table import Table

CLASSES = 21
"""Of a network that is no run, where none are asked for: Pascal VOC's."""
SOURCES = {
    "stages": "named by the network's stages",
    "traced": "found by tracing one forward",
    "given": "given by name",
}


@dataclass(frozen=True)
class TargetReading:
    """A network with the name it was given by."""

    target: str
    classes: int
    reading: NetworkReading

    def summary(self) -> dict[str, Any]:
        """The figures, for --json."""
        found = self.reading
        choice = found.choice
        return {
            "target": self.target,
            "network": found.kind,
            "classes": self.classes,
            "size": list(found.size),
            "source": choice.source,
            "taps": [
                {
                    "name": name,
                    "type": map_.kind,
                    "layout": map_.layout,
                    "channels": map_.channels,
                    "grid": list(map_.grid),
                    "stride": map_.stride,
                    "skipped": map_.skipped,
                    "reason": reason,
                }
                for name, map_, reason in zip(
                    choice.names, choice.maps, choice.reasons, strict=True
                )
            ],
            "auxiliary_heads": found.auxiliary_heads,
            "auxiliary": [
                {
                    "name": head.name,
                    "parameters": head.parameters,
                    "runs": head.runs,
                    "classes": head.classes,
                }
                for head in found.auxiliary
            ],
            "output": {
                "form": found.output.kind,
                "classes": found.output.classes,
                "grid": list(found.output.grid),
            },
        }


def read_target(
    target: str,
    classes: int | None,
    options: Sequence[str],
    size: str | None,
    taps: str | None,
) -> TargetReading:
    """Reads a run's network, a built-in one, or one from the user's code.

    options: KEY=VALUE texts. Raises UserError for a target that is none of these, for options that
    a run decides itself, and where the network can't be read.
    """
    wanted = None if size is None else parse_size(size, "--size")
    names: str | list[str] = "auto" if taps is None else [n.strip() for n in taps.split(",")]
    folder = Path(target)
    if is_run(folder) or (folder.is_dir() and target not in NETWORKS):
        if classes is not None or options:
            flag = "--classes" if classes is not None else "--option"
            raise UserError(f"{target} is a run, which has its own network: leave {flag} out")
        run = open_run(folder)
        near = wanted or run.spec.input.near(PROBE_SIZE)
        count = run.spec.class_count
        network = build_network(run.network, count, size=near)
        reading = read_network(network, count, names, regulation_of(run), near)
        return TargetReading(target, count, reading)
    if ":" not in target and target not in NETWORKS:
        raise UserError(
            f"'{target}' is no run folder, no built-in network and no my_package.models:function; "
            f"of the built-in ones: {closest(target, NETWORKS)}"
        )
    count = CLASSES if classes is None else classes
    network = make_network(target, count, **parse_options(options))
    reading = read_network(network, count, names, size=wanted or PROBE_SIZE)
    return TargetReading(target, count, reading)


def taps_table(found: TargetReading) -> "Table":
    """One row per tap: what it gives, and why it was chosen."""
    from rich.table import Table
    from rich.text import Text

    reading = found.reading
    height, width = reading.size
    table = Table(
        title=Text(f"{found.target} ({reading.kind}); taps {SOURCES[reading.choice.source]}"),
        caption=f"probed on a blank image of {height}x{width} (height x width)",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("exit", justify="right")
    for column in ("module", "type", "layout"):
        table.add_column(column, overflow="fold")
    table.add_column("channels", justify="right")
    table.add_column("stride", justify="right")
    table.add_column("why", overflow="fold")
    choice = reading.choice
    for index, (name, map_, reason) in enumerate(
        zip(choice.names, choice.maps, choice.reasons, strict=True), start=1
    ):
        layout = map_.layout + (f", {map_.skipped} extra" if map_.skipped else "")
        why = reason.removeprefix(f"{name} ({map_.kind}): ")  # those have columns of their own
        words = (str(index), name, map_.kind, layout, str(map_.channels), str(map_.stride), why)
        table.add_row(*(Text(word) for word in words))
    output = reading.output
    stride = reading.size[0] / output.grid[0]
    form = (str(output.classes), f"{stride:g}", output.kind)
    table.add_row("", "output", reading.kind, "NCHW", *(Text(word) for word in form))
    return table


def heads_table(found: TargetReading) -> "Table | None":
    """One row per head of the network's own, and what becomes of it; None where there is none."""
    from rich.table import Table
    from rich.text import Text

    rows = list(_heads(found.reading))
    if not rows:
        return None
    table = Table(title="Heads of the network's own", title_justify="left")
    table.add_column("module", overflow="fold")
    table.add_column("parameters", justify="right")
    table.add_column("what becomes of it", overflow="fold")
    for row in rows:
        table.add_row(*(Text(word) for word in row))
    return table


def _heads(reading: NetworkReading) -> Iterator[tuple[str, str, str]]:
    auxiliary = {head.name: head for head in reading.auxiliary}
    for name, weight in reading.auxiliary_heads.items():
        if name not in auxiliary:
            fate = f"supervised in training, weight {weight:g}; deployed: the output depends on it"
            yield name, f"{reading.own_parameters[name]:,}", fate
    for head in reading.auxiliary:
        weight_ = reading.auxiliary_heads.get(head.name)
        if weight_ is not None:
            training = f"supervised in training, weight {weight_:g}"
        elif not head.runs:
            training = "does not run in the forward, so it is not trained"
        elif head.classes is None:
            training = "gives no map of classes, so it is not trained"
        else:
            training = f"gives {head.classes} channels, not the classes, so it is not trained"
        yield head.name, f"{head.parameters:,}", f"{training}; left out of what is deployed"


def hint(found: TargetReading) -> str:
    """How to name taps oneself."""
    names = ", ".join(found.reading.choice.names)
    quoted = ", ".join(repr(name) for name in found.reading.choice.names)
    return (
        f"to choose taps yourself: srdeploy train DATA --set 'regulation.taps=[{names}]', "
        f"or SelfRegulation(network, classes={found.classes}, taps=[{quoted}])"
    )
