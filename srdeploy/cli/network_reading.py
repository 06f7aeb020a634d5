"""What `srdeploy inspect TARGET` shows without photos: how self-regulation and export take a
network."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srdeploy.cli.with_exits import regulation_of
from srdeploy.errors import UserError
from srdeploy.models import NETWORKS, make_network
from srdeploy.models.tracing import PROBE_SIZE
from srdeploy.runs import build_network, is_run, open_run
from srdeploy.train.reading import NetworkReading, read_network
from srdeploy.validation import closest, parse_options, parse_size

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
            "own_exits": found.own_exits,
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
    for name, weight in reading.own_exits.items():
        if name not in auxiliary:
            fate = f"supervised in training, weight {weight:g}; deployed: the output depends on it"
            yield name, f"{reading.own_parameters[name]:,}", fate
    for head in reading.auxiliary:
        weight_ = reading.own_exits.get(head.name)
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
