"""`srdeploy train`, with masks or with image tags, and `srdeploy recipes`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from srdeploy import console
from srdeploy.cli.options import (
    CONFIGURATION,
    NETWORK,
    RUN,
    SUPERVISION,
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
from srdeploy.errors import UserError

if TYPE_CHECKING:
    from srdeploy.train.config import TrainConfig


def train(
    out: Annotated[
        Path,
        typer.Option(
            metavar="RUN", help="Run folder to write, e.g. runs/NAME.", rich_help_panel=RUN
        ),
    ],
    data: Annotated[
        Path | None,
        typer.Argument(help="Folder of the data set; optional with --resume.", show_default=False),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Plain network: a built-in one's name (default: deeplabv2-mobilenetv2), or your "
            "own as PACKAGE.MODULE:FUNCTION.",
            rich_help_panel=NETWORK,
        ),
    ] = None,
    option: NetworkOptions = None,
    regulation: Annotated[
        bool | None,
        typer.Option(
            "--sr/--no-sr",
            help="Self-regulation, or the baseline (default: --sr).",
            rich_help_panel=NETWORK,
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
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NETWORK/DATA",
            help="Recipe to start from: see srdeploy recipes.",
            rich_help_panel=CONFIGURATION,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="YAML to start from.", rich_help_panel=CONFIGURATION),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any key, with dots; may be repeated.",
            rich_help_panel=CONFIGURATION,
        ),
    ] = None,
    supervision: Annotated[
        str,
        typer.Option(
            metavar="masks|image",
            help="image: train on the tags in labels.csv, through pseudo masks in OUT-pseudo.",
            rich_help_panel=SUPERVISION,
        ),
    ] = "masks",
    labels_from_masks: Annotated[
        bool,
        typer.Option(
            "--labels-from-masks",
            help="With --supervision image: take tags from the masks, to measure what the lack of "
            "masks costs.",
            rich_help_panel=SUPERVISION,
        ),
    ] = False,
    rounds: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="With --supervision image: trainings; from the second on, the last trained "
            "network makes the masks (self-training).",
            min=1,
            rich_help_panel=SUPERVISION,
        ),
    ] = 1,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the run in OUT, with its configuration.",
            rich_help_panel=RUN,
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the run in OUT.", rich_help_panel=RUN)
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train a network with self-regulation, or the baseline (--no-sr), into a run folder.

    Later sources win: defaults, --recipe, --config, the flags here, --set. The config.yaml in the
    run folder lists every key and can be given as --config. Ctrl-C stops after the step and saves;
    --resume goes on from there.

    Example: srdeploy train data --network deeplabv2-resnet18 --pretrained imagenet --out runs/sr

    Example: srdeploy train data --network my_package.models:make_network --out runs/own

    Example: srdeploy train data --out runs/base --no-sr --set accumulate=2 --set scale=[0.75,1.5]

    Example: srdeploy train --out runs/sr --resume

    Example: srdeploy train camvid --recipe segnet/camvid --batch 4 --out runs/segnet

    Example: srdeploy train photos --supervision image --pretrained imagenet --out runs/tags

    Example: torchrun --nproc-per-node 4 -m srdeploy train data --batch 16 --out runs/four
    """
    from srdeploy.train.distributed import joined, leave
    from srdeploy.train.loop import train as run_training
    from srdeploy.validation import parse_options

    console.set_quiet(quiet or as_json)
    flags = {
        "data": data,
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
    given = {key: value for key, value in flags.items() if value is not None}
    if supervision == "image":
        _train_on_tags(
            out,
            recipe,
            config,
            given,
            settings or [],
            labels_from_masks,
            rounds,
            resume,
            force,
            as_json,
        )
        return
    _refuse_without_tags(supervision, labels_from_masks, rounds)
    with joined() as world:
        configured = _configure(out, resume, recipe, config, given, settings or [])
        result = run_training(configured, out, resume, force, world)
    if as_json and world.leads:
        console.print_json(result.summary())
    if world.size > 1:
        leave(0 if result.finished else 1)
    if not result.finished:
        raise typer.Exit(1)


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(help="One recipe, NETWORK/DATA: print its YAML.", show_default=False),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """List the recipes for `srdeploy train --recipe`, or print one.

    A recipe combines any network below with any data set. A printed recipe can be saved, changed
    and given to train as --config.

    Example: srdeploy recipes

    Example: srdeploy recipes segnet/camvid > mine.yaml
    """
    from srdeploy.train.config import DATA, NETWORKS, open_recipe, recipe_parts

    console.set_quiet(quiet or as_json)
    if name is None:
        parts = {kind: recipe_parts(kind) for kind in (NETWORKS, DATA)}
        if as_json:
            console.print_json(parts)
            return
        for kind, about in parts.items():
            typer.echo(f"{kind}:")
            width = max(map(len, about))
            for part, line in about.items():
                typer.echo(f"  {part:{width}}  {line}")
        typer.echo("a recipe is NETWORK/DATA: srdeploy train DATA --recipe NETWORK/DATA --out RUN")
        return
    recipe = open_recipe(name)
    if as_json:
        console.print_json({"name": recipe.name, "values": recipe.values})
    else:
        typer.echo(recipe.text, nl=False)


def register(app: typer.Typer) -> None:
    """Adds `train` and `recipes` to the command line."""
    add_verb(app, "train", train, TRAIN)
    add_verb(app, "recipes", recipes, TRAIN)


def _refuse_without_tags(supervision: str, labels_from_masks: bool, rounds: int) -> None:
    """Raises UserError for flags that mean nothing when masks are trained on."""
    from srdeploy.validation import closest

    if supervision != "masks":
        raise UserError(f"--supervision {supervision}: {closest(supervision, ['masks', 'image'])}")
    if labels_from_masks or rounds != 1:
        flag = "--labels-from-masks" if labels_from_masks else "--rounds"
        raise UserError(f"{flag} belongs to --supervision image: give that too, or leave it out")


def _train_on_tags(
    out: Path,
    recipe: str | None,
    file: Path | None,
    flags: dict[str, Any],
    settings: list[str],
    labels_from_masks: bool,
    rounds: int,
    resume: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Trains from image tags, prints the result, and exits with 1 if it was stopped."""
    from srdeploy.train.config import load_config
    from srdeploy.train.distributed import found_world
    from srdeploy.train.weak.from_tags import WeakSettings, split_settings, train_from_tags
    from srdeploy.train.weak.pseudo_run import PseudoConfig
    from srdeploy.validation import validated

    if found_world().size > 1:
        raise UserError(
            "--supervision image runs in one process: make the masks with srdeploy pseudo first, "
            "then start torchrun on them"
        )
    if resume and force:
        raise UserError("--resume and --force exclude each other: continue the run, or replace it")
    content, others, classifier, pseudo = split_settings(file, settings)
    if "data" not in flags and "data" not in content:
        raise UserError("no data set given: srdeploy train DATA --supervision image --out RUN")
    config = load_config(None, file, flags, others, recipe, content)
    weak = WeakSettings(
        classifier=classifier,
        pseudo=validated(PseudoConfig, pseudo, "the settings of pseudo"),
        labels_from_masks=labels_from_masks,
        rounds=rounds,
    )
    result = train_from_tags(config, weak, out, resume, force)
    if as_json and result is not None:
        console.print_json(result.summary())
    if result is None or not result.finished:
        raise typer.Exit(1)


def _configure(
    out: Path,
    resume: bool,
    recipe: str | None,
    file: Path | None,
    flags: dict[str, Any],
    settings: list[str],
) -> "TrainConfig":
    from srdeploy.train.config import load_config
    from srdeploy.train.run_folder import saved_config

    if resume and recipe is not None:
        raise UserError(
            f"--resume continues with the configuration that {out} began with: leave --recipe out"
        )
    base = saved_config(out).model_dump(mode="json") if resume else None
    if base is None and file is None and "data" not in flags and not settings:
        raise UserError("no data set given: srdeploy train DATA --out RUN")
    return load_config(base, file, flags, settings, recipe)
