"""What `srdeploy models` shows: the plain networks' sizes and work, and what regulating adds."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from srdeploy.errors import UserError
from srdeploy.models import INTERPRETATIONS, NETWORKS, make_network
from srdeploy.models.cost import ShapesAlone, count_macs_by_module, count_parameters
from srdeploy.models.tracing import PROBE_SIZE, Size, trace_maps
from srdeploy.train.regulation import SelfRegulation

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class StageCost:
    """One stage of a network, and the exit that reads it in training."""

    name: str
    """Dotted name of the module."""
    kind: str
    """The module's class."""
    channels: int
    """Of its map, or of the first of several."""
    stride: int
    """Input pixels per cell of that map."""
    exit_parameters: int
    exit_macs: int


@dataclass(frozen=True)
class NetworkCost:
    """A plain network in figures, for `classes` classes and an image of `size` (H, W)."""

    name: str
    options: dict[str, Any]
    """Those that were given; the others have their defaults."""
    classes: int
    size: Size
    interpretation: bool
    """The paper leaves details open: parameters and work are ours."""
    parameters: int
    macs: int
    """Multiply-accumulates of one image: convolutions and matrix products."""
    output_stride: int
    """Input pixels per cell of the logits, before they are resized."""
    source: str
    """Where the stages come from: "stages", named by the network, or "traced"."""
    stages: tuple[StageCost, ...]
    """Shallow to deep: where exits are attached in training."""
    auxiliary_heads: dict[str, float]
    """Further heads that training supervises, with their loss weights."""
    added_parameters: int
    """Of the exits, only in training."""
    added_macs: int
    """Of the exits' forward, only in training."""

    def summary(self) -> dict[str, Any]:
        """The figures, for --json."""
        return {**asdict(self), "size": list(self.size)}

    @property
    def added(self) -> tuple[float, float]:
        """What regulating adds to parameters and to the forward's work, in per cent."""
        return (
            100 * self.added_parameters / max(1, self.parameters),
            100 * self.added_macs / max(1, self.macs),
        )


def network_cost(name: str, classes: int, size: Size, options: Mapping[str, Any]) -> NetworkCost:
    """Builds the network `name` (a built-in one's, or "package.module:function") and counts.

    Built-in networks need neither memory nor time: no value of theirs is computed. Raises UserError
    where the network can't be built, tapped, or can't take an image of `size`.
    """
    regulated, probe = _regulated(name, classes, size, options)
    network, exits, choice = regulated.network, regulated.exits, regulated.choice
    assert exits is not None
    assert choice is not None
    try:
        macs = count_macs_by_module(regulated, size)
    except Exception as error:  # a user's network may raise anything
        reason = next((line for line in str(error).splitlines() if line.strip()), "no message")
        raise UserError(
            f"network '{name}' can't take an image of {size[0]}x{size[1]} "
            f"({type(error).__name__}: {reason}): give another --size"
        ) from error
    stages = tuple(
        StageCost(
            name=one.name,
            kind=one.kind,
            channels=one.channels,
            stride=one.stride,
            exit_parameters=count_parameters(tap),
            exit_macs=macs[f"exits.taps.{index}"],
        )
        for index, (one, tap) in enumerate(zip(choice.maps, exits.taps, strict=True))
    )
    return NetworkCost(
        name=name,
        options=dict(options),
        classes=classes,
        size=size,
        interpretation=name in INTERPRETATIONS,
        parameters=count_parameters(network),
        macs=macs.get("network", 0),
        output_stride=_output_stride(regulated, probe),
        source=choice.source,
        stages=stages,
        auxiliary_heads=dict(regulated.auxiliary_heads),
        added_parameters=count_parameters(exits),
        added_macs=macs[""] - macs.get("network", 0),
    )


def _regulated(
    name: str, classes: int, size: Size, options: Mapping[str, Any]
) -> tuple[SelfRegulation, Size]:
    """The network with its exits, and the size (H, W) on which it was probed."""
    if name in NETWORKS:
        with torch.device("meta"), ShapesAlone():  # type: ignore[no-untyped-call]
            network = make_network(name, classes, **options)
    else:
        network = make_network(name, classes, **options)  # a user's code may compute with values
    with ShapesAlone():  # type: ignore[no-untyped-call]
        try:
            return SelfRegulation(network, classes), PROBE_SIZE
        except UserError:
            # Some networks take images of only one size. What else is wrong fails again.
            return SelfRegulation(network, classes, probe_size=size), size


def _output_stride(regulated: SelfRegulation, probe: Size) -> int:
    """Of the last map with a channel per class that is not of a further head."""
    with ShapesAlone():  # type: ignore[no-untyped-call]
        maps = trace_maps(regulated.network, probe)
    heads = regulated.auxiliary_heads
    found = [
        one.stride
        for one in maps
        if one.name
        and one.channels == regulated.classes
        and not any(one.name == head or one.name.startswith(f"{head}.") for head in heads)
    ]
    return found[-1] if found else maps[-1].stride


def builder_options(name: str) -> dict[str, Any]:
    """Keyword options of a built-in network's builder, with their defaults."""
    return {
        parameter.name: parameter.default
        for parameter in inspect.signature(NETWORKS[name]).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def networks_table(costs: Sequence[NetworkCost]) -> "Table":
    """One row per network."""
    from rich.table import Table

    first = costs[0]
    table = Table(
        title=f"{first.classes} classes, one image of {first.size[0]}x{first.size[1]} "
        "(height x width)",
        caption=_legend(costs),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("network", no_wrap=True)
    for header in ("parameters", "GMACs", "stride", "exits"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("own exits", overflow="fold")
    table.add_column("exits add\nparam.", justify="right", no_wrap=True)
    table.add_column("\nGMACs", justify="right", no_wrap=True)
    for cost in costs:
        parameters, macs = cost.added
        table.add_row(
            cost.name + ("*" if cost.interpretation else ""),
            f"{cost.parameters:,}",
            f"{cost.macs / 1e9:.2f}",
            str(cost.output_stride),
            str(len(cost.stages)),
            ", ".join(cost.auxiliary_heads),
            f"{parameters:.1f} %",
            f"{macs:.1f} %",
        )
    return table


def network_table(cost: NetworkCost) -> "Table":
    """One row per stage of one network, with the exit that reads it in training."""
    from rich.table import Table
    from rich.text import Text

    parameters, macs = cost.added
    table = Table(
        title=Text(
            f"{cost.name}, {cost.classes} classes: {cost.parameters:,} parameters, "
            f"{cost.macs / 1e9:.2f} GMACs at {cost.size[0]}x{cost.size[1]}, logits at stride "
            f"{cost.output_stride}"
        ),
        caption=Text("\n".join(_remarks(cost))),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("stage", overflow="fold")
    table.add_column("type", overflow="fold")
    for header in ("channels", "stride", "exit's parameters", "exit's GMACs"):
        table.add_column(header, justify="right")
    for stage in cost.stages:
        table.add_row(
            Text(stage.name),
            stage.kind,
            str(stage.channels),
            str(stage.stride),
            f"{stage.exit_parameters:,}",
            f"{stage.exit_macs / 1e9:.3f}",
        )
    table.add_section()
    table.add_row(
        "all exits, only in training",
        "",
        "",
        "",
        f"{cost.added_parameters:,} ({parameters:.1f} %)",
        f"{cost.added_macs / 1e9:.3f} ({macs:.1f} %)",
    )
    return table


def _legend(costs: Sequence[NetworkCost]) -> str:
    lines = [
        "GMACs: 10^9 multiply-accumulates of convolutions and matrix products, forward.",
        "stride: of the logits, before they are resized.",
        "exits: one per stage, only in training; nothing is left of them in what is deployed.",
        "own exits: further heads of the network itself that training supervises.",
    ]
    if any(cost.interpretation for cost in costs):
        lines.append("* an interpretation: the paper leaves its widths open")
    return "\n".join(lines)


def _remarks(cost: NetworkCost) -> list[str]:
    lines = []
    if cost.interpretation:
        lines.append("an interpretation: the paper leaves its widths open")
    if cost.auxiliary_heads:
        lines.append(f"supervised in training as well (module, weight): {_heads(cost)}")
    if cost.source == "traced":
        lines.append("the network names no stages: these were found by tracing one forward")
    if cost.name in NETWORKS:
        known = {**builder_options(cost.name), **cost.options}
        lines.append("options: " + ", ".join(f"{key}={value}" for key, value in known.items()))
    return lines


def _heads(cost: NetworkCost) -> str:
    return ", ".join(f"{name} {weight:g}" for name, weight in cost.auxiliary_heads.items())
