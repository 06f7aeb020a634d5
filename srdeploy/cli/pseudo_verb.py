"""`srdeploy pseudo`: masks from image tags."""

from pathlib import Path
from typing import Annotated, Any

import typer

from srdeploy.cli.options import (
    NETWORK,
    Batch,
    Crop,
    Json,
    NetworkOptions,
    Pretrained,
    Quiet,
    Rate,
    Seed,
    Steps,
    TrainingDevice,
    Workers,
)
from srdeploy.cli.verbs import TRAIN, add_verb


def pseudo(
    out: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="Folder to write: a data set, in the same layout."),
    ],
    data: Annotated[
        Path | None,
        typer.Argument(help="Folder of the data set, with labels.csv; optional once OUT exists."),
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="STEP", help="Only one step: classify, maps or masks.")
    ] = None,
    labels_from_masks: Annotated[
        bool | None,
        typer.Option(
            "--labels-from-masks/--labels-from-file",
            help="Take tags from the masks, to measure what the lack of masks costs.",
            show_default=False,
            rich_help_panel="Source of the tags",
        ),
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", help="Maps from a trained run instead of a classifier: self-training."
        ),
    ] = None,
    train_split: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Split that gets masks; join several with '+'."),
    ] = None,
    val_split: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Split to validate on; keeps any masks that it has."),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Network whose encoder is the classifier (default: deeplabv2-mobilenetv2).",
            rich_help_panel=NETWORK,
        ),
    ] = None,
    option: NetworkOptions = None,
    regulation: Annotated[
        bool | None,
        typer.Option(
            "--sr/--no-sr", help="Classifiers at every stage and SR-L, or one (default: --sr)."
        ),
    ] = None,
    steps: Steps = None,
    batch: Batch = None,
    crop: Crop = None,
    lr: Rate = None,
    pretrained: Pretrained = None,
    seed: Seed = None,
    device: TrainingDevice = None,
    workers: Workers = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="YAML: keys of train, and a section 'pseudo'."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A key of the classifier's training, or pseudo.KEY; may be repeated.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Retrain the classifier if its settings differ.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Make masks of image tags: a data set that `srdeploy train` trains on.

    Three steps. classify: train a multi-label classifier on the tags. maps: compute its class
    activation maps, over scales and mirrored photos. masks: refine the maps along the photos' edges
    and give each pixel a class, the background, or the ignore index where that is unclear. A mask
    never shows a class that the photo's tags lack. OUT/confidence holds how sure each pixel is (for
    train --set confidence=true).

    The same command continues where it stopped and remembers its settings; changed settings repeat
    the steps that they affect. Look at OUT/pseudo/contact-sheet.png and worst.html.

    DATA/labels.csv holds the tags: "image,classes" and lines like "train/cow_1.jpg,cow;person".

    Example: srdeploy pseudo photos --pretrained imagenet --out photos-pseudo

    Example: srdeploy pseudo --out photos-pseudo --only masks --set pseudo.background=0.3

    Example: srdeploy pseudo photos --teacher runs/first --out photos-round-2
    """
    from srdeploy import console
    from srdeploy.errors import UserError
    from srdeploy.train.weak.pseudo import STEPS, make_pseudo
    from srdeploy.train.weak.pseudo_run import load_pseudo_run, saved_pseudo_run
    from srdeploy.validation import closest, parse_options

    console.set_quiet(quiet or as_json)
    flags: dict[str, Any] = {
        "data": data,
        "train_split": train_split,
        "val_split": val_split,
        "network.name": network,
        "network.options": parse_options(option) if option else None,
        "regulation.enabled": regulation,
        "steps": steps,
        "batch": batch,
        "crop": crop,
        "lr": lr,
        "pretrained": pretrained,
        "seed": seed,
        "device": device,
        "workers": workers,
    }
    step = next((one for one in STEPS if one == only), None)
    if only is not None and step is None:
        raise UserError(f"--only {only}: {closest(only, STEPS)}")
    if data is None and config is None and saved_pseudo_run(out) is None:
        raise UserError("no data set given: srdeploy pseudo DATA --out DIR")
    given = {key: value for key, value in flags.items() if value is not None}
    run = load_pseudo_run(out, config, given, settings or [], labels_from_masks, teacher)
    report = make_pseudo(run, out, step, force)
    if report is None:
        console.warn(f"stopped, everything is saved; go on with: srdeploy pseudo --out {out}")
        raise typer.Exit(1)
    if as_json:
        console.print_json({"folder": str(out), **report})
    elif only in (None, "masks"):
        console.say(f"look at {out}/pseudo/contact-sheet.png and {out}/pseudo/worst.html")
        split = run.classifier.train_split
        more = "" if split == "train" else f" --set train_split={split}"
        console.say(f"next: srdeploy train {out}{more} --out runs/NAME")


def register(app: typer.Typer) -> None:
    """Adds `pseudo` to the command line."""
    add_verb(app, "pseudo", pseudo, TRAIN)
