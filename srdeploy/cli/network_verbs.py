"""`srdeploy models` and `srdeploy inspect`: what networks cost, and what their exits see."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from srdeploy.cli.options import Device, Json, NetworkOptions, Quiet
from srdeploy.cli.verbs import TRAIN, add_verb

if TYPE_CHECKING:
    from srdeploy.studies.inspection import PhotoView


def models(
    name: Annotated[
        str | None,
        typer.Argument(
            help="One network in detail: a built-in one's name, or my_package.models:make_network.",
            show_default=False,
        ),
    ] = None,
    classes: Annotated[int, typer.Option(metavar="N", help="Number of classes.", min=2)] = 21,
    size: Annotated[
        str, typer.Option(metavar="HxW", help="Image size that operations are counted for.")
    ] = "512x1024",
    option: NetworkOptions = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """List the networks: parameters, operations, stages, and what self-regulation adds in training.

    Operations are those of one forward pass: convolutions and matrix products. The exits are the
    default ones, one per stage; nothing of them is deployed.

    Example: srdeploy models

    Example: srdeploy models hourglass --classes 16 --size 256x256 --option stacks=8
    """
    from srdeploy import console
    from srdeploy.errors import UserError
    from srdeploy.models import NETWORKS
    from srdeploy.studies.model_table import network_cost, network_table, networks_table
    from srdeploy.validation import parse_options, parse_size

    console.set_quiet(quiet or as_json)
    wanted = parse_size(size, "--size")
    if name is not None:
        cost = network_cost(name, classes, wanted, parse_options(option or []))
        if as_json:
            console.print_json(cost.summary())
        else:
            console.print_table(network_table(cost))
        return
    if option:
        raise UserError("--option is for one network: name it, such as srdeploy models unet")
    names = console.track(NETWORKS, "counting", total=len(NETWORKS))
    costs = [network_cost(one, classes, wanted, {}) for one in names]
    if as_json:
        networks = [cost.summary() for cost in costs]
        console.print_json({"classes": classes, "size": list(wanted), "networks": networks})
    else:
        console.print_table(networks_table(costs))


def inspect(
    target: Annotated[
        str,
        typer.Argument(
            help="A run folder, a built-in network's name, or my_package.models:make_network.",
            show_default=False,
        ),
    ],
    images: Annotated[
        list[Path] | None,
        typer.Argument(help="Photos to show the run's exits on.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Page (.html) or picture (.png) to write (default: inspect-PHOTO.html; none with "
            "--json).",
        ),
    ] = None,
    before: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", help="Another run to show above the first, usually its baseline."
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="The photo's label mask, or a folder of PHOTO.png masks: shows the targets and "
            "each exit's accuracy.",
        ),
    ] = None,
    blend: Annotated[
        float,
        typer.Option(metavar="F", help="Share of the photo in the maps.", min=0, max=1),
    ] = 0.0,
    classes: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Classes of a network that is not a run (default: 21).", min=2
        ),
    ] = None,
    option: NetworkOptions = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="HxW", help="Image size that the network is read at."),
    ] = None,
    taps: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help="Modules to tap, shallow to deep (default: chosen)."),
    ] = None,
    device: Device = "cpu",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Show how a network is read (its taps and why, its heads), or what each exit of a run sees.

    Without photos: the modules that exits would tap, and why; the network's supervised auxiliary
    heads; the heads that are dropped; the form of its output.

    With photos, one column per exit of a run: how well its features separate the image's parts, its
    segmentation, its class scores. A .png shows one photo. --before RUN stacks two runs, such as
    the baseline and the regulated one.

    Example: srdeploy inspect runs/sr photo.jpg --before runs/base --out inspect.html

    Example: srdeploy inspect my_package.models:make_network --classes 19 --option depth=50
    """
    from srdeploy import console

    console.set_quiet(quiet or as_json)
    network_only: dict[str, Any] = {
        "--classes": classes,
        "--option": option,
        "--size": size,
        "--taps": taps,
    }
    photo_only: dict[str, Any] = {"--before": before, "--labels": labels, "--out": out}
    if images:
        _refuse_options(network_only, "says how to read a network: leave the photos out")
        _inspect_photos(target, images, out, before, labels, blend, device, as_json)
    else:
        _refuse_options(photo_only, "is for photos: name them after the run")
        _inspect_network(target, classes, option or [], size, taps, as_json)


def register(app: typer.Typer) -> None:
    """Adds `models` and `inspect` to the command line."""
    add_verb(app, "models", models, TRAIN)
    add_verb(app, "inspect", inspect, TRAIN)


def _inspect_network(
    target: str,
    classes: int | None,
    options: list[str],
    size: str | None,
    taps: str | None,
    as_json: bool,
) -> None:
    from srdeploy import console
    from srdeploy.studies.network_report import heads_table, hint, read_target, taps_table

    found = read_target(target, classes, options, size, taps)
    if as_json:
        console.print_json(found.summary())
        return
    console.print_table(taps_table(found))
    heads = heads_table(found)
    if heads is not None:
        console.print_table(heads)
    console.say(hint(found))


def _inspect_photos(
    target: str,
    images: list[Path],
    out: Path | None,
    before: Path | None,
    labels: Path | None,
    blend: float,
    device: str,
    as_json: bool,
) -> None:
    from srdeploy import console
    from srdeploy.errors import UserError
    from srdeploy.studies.inspection import exits_table, load_subjects, summary, view_photos

    if out is None and not as_json:
        out = Path(f"inspect-{images[0].stem}.html" if len(images) == 1 else "inspect.html")
    if out is not None:
        _check_out(out, images)
    if not Path(target).exists():
        raise UserError(
            f"no run folder {target}: photos are shown through the exits of a run (srdeploy train)"
        )
    views = view_photos(load_subjects(Path(target), before, device), images, labels)
    if out is not None:
        _write(views, out, blend, _command(target, images, before, labels, blend, out))
    if as_json:
        written = None if out is None else str(out)
        console.print_json({"out": written, "photos": [summary(view) for view in views]})
        return
    for view in views:
        console.print_table(exits_table(view))
    console.done(f"wrote {out}")


def _check_out(out: Path, images: list[Path]) -> None:
    """Refuses a path that can't be written as asked, before any work is done."""
    from srdeploy.errors import UserError

    kind = out.suffix.lower()
    if kind not in (".html", ".png"):
        raise UserError(f"--out {out}: a page (.html) or a picture (.png) can be written")
    if kind == ".png" and len(images) > 1:
        raise UserError(
            f"--out {out}: a picture shows one photo, {len(images)} are given: write a page (.html)"
        )
    if out.resolve() in [image.resolve() for image in images]:
        raise UserError(f"--out {out} is one of the photos: give another name")


def _write(views: "tuple[PhotoView, ...]", out: Path, blend: float, command: str) -> None:
    if out.suffix.lower() == ".png":
        from srdeploy.studies.inspection_figure import write_figure

        write_figure(views[0], out, blend)
    else:
        from srdeploy.studies.inspection_page import write_page

        write_page(views, out, command, blend)


def _command(
    target: str,
    images: list[Path],
    before: Path | None,
    labels: Path | None,
    blend: float,
    out: Path,
) -> str:
    """The command that makes the page again, for its foot."""
    import shlex

    words = ["srdeploy", "inspect", target, *map(str, images)]
    for flag, value in (("--before", before), ("--labels", labels), ("--blend", blend or None)):
        words += [] if value is None else [flag, str(value)]
    return shlex.join([*words, "--out", str(out)])


def _refuse_options(given: "dict[str, Any]", reason: str) -> None:
    from srdeploy.errors import UserError

    for name, value in given.items():
        if value is not None:
            raise UserError(f"{name} {reason}")
