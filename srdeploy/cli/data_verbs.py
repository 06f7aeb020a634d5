"""`srdeploy data`: make a data set to try things on, and check one before training."""

from pathlib import Path
from typing import Annotated

import typer

from srdeploy.cli.options import Force, Json, Quiet
from srdeploy.cli.verbs import TRAIN, add_verb

data_app = typer.Typer(
    no_args_is_help=True,
    help="Make a data set to try things on, or check one before training.\n\n"
    "Example: srdeploy data check scenes",
)


def synth(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the data set is written.")],
    train: Annotated[int, typer.Option(help="Scenes for training.", min=0)] = 200,
    val: Annotated[int, typer.Option(help="Scenes for validation.", min=0)] = 40,
    test: Annotated[int, typer.Option(help="Scenes for testing.", min=0)] = 40,
    size: Annotated[str, typer.Option(metavar="HxW", help="Size in pixels.")] = "120x160",
    seed: Annotated[int, typer.Option(help="Equal seeds give equal files.", min=0)] = 0,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Write synthetic scenes with exact masks that show the two failures self-regulation addresses.

    Deer, sheep and herons have thin legs and stand far away.
    Cow and buffalo look alike: only the fence or the water around them tells which is which.

    Example: srdeploy data synth scenes --train 400 --seed 7
    """
    from srdeploy import console
    from srdeploy.data.synth import synthesise
    from srdeploy.validation import parse_size

    console.set_quiet(quiet)
    height, width = parse_size(size, "--size")
    synthesise(
        folder,
        train=train,
        val=val,
        test=test,
        width=width,
        height=height,
        seed=seed,
        force=force,
    )
    console.done(f"{train + val + test} scenes in {folder}")
    console.say(f"next: srdeploy train {folder} --out runs/NAME")


def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The data set.")],
    split: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Split to check, may be repeated (default: all)."),
    ] = None,
    layout: Annotated[str, typer.Option(help="auto, folder, voc or cityscapes.")] = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Decode every photo and mask; report faults and how often each class occurs.

    Finds missing pairs, unreadable files, sizes that differ and ids that are no class. The exit
    code is 1 if it finds a fault.

    If DIR has labels.csv or labels.json, a split may have tags instead of masks: a header
    "image,classes", then lines such as "cow_1.jpg,cow;person". Finds unknown classes, photos that
    are missing, not listed or listed twice, and tags that a mask contradicts.

    Example: srdeploy data check scenes --split train --split val

    Example: srdeploy data check tagged --split train --json
    """
    from srdeploy import console
    from srdeploy.data.check import SHOWN_FAULTS, check_dataset, distribution_table

    console.set_quiet(quiet or as_json)
    report = check_dataset(folder, split, layout)
    if as_json:
        console.print_json({"passed": report.passed, **report.model_dump(mode="json")})
    else:
        console.print_table(distribution_table(report))
        for fault in report.faults[:SHOWN_FAULTS]:
            console.failed(f"{fault.kind}: {fault.path}: {fault.detail}")
        if len(report.faults) > SHOWN_FAULTS:
            console.say(f"... and {len(report.faults) - SHOWN_FAULTS} more (--json lists all)")
    if not report.passed:
        counts = ", ".join(f"{count} x {kind}" for kind, count in report.fault_counts().items())
        console.failed(f"{len(report.faults)} faults: {counts}")
        raise typer.Exit(1)
    with_masks = all(found.labels == "masks" for found in report.splits.values())
    noun = "pairs" if with_masks else "photos"
    console.done(f"{sum(s.images for s in report.splits.values())} {noun}, no faults")


def register(app: typer.Typer) -> None:
    """Adds `data synth` and `data check` to the command line."""
    add_verb(data_app, "synth", synth)
    add_verb(data_app, "check", check)
    app.add_typer(data_app, name="data", rich_help_panel=TRAIN)
