"""`srdeploy train --supervision image`: from flags to training on tags."""

from pathlib import Path
from typing import Any

import typer

from srdeploy import console
from srdeploy.errors import UserError
from srdeploy.validation import closest, validated


def refuse_without_tags(supervision: str, labels_from_masks: bool, rounds: int) -> None:
    """Raises UserError for flags that mean nothing where masks are trained on."""
    if supervision != "masks":
        raise UserError(f"--supervision {supervision}: {closest(supervision, ['masks', 'image'])}")
    if labels_from_masks or rounds != 1:
        flag = "--labels-from-masks" if labels_from_masks else "--rounds"
        raise UserError(f"{flag} belongs to --supervision image: give that too, or leave it away")


def train_on_tags(
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
    """Runs it, prints its result, and exits with 1 where it was stopped."""
    from srdeploy.train.config import load_config
    from srdeploy.train.distributed import found_world
    from srdeploy.train.weak.from_tags import WeakSettings, split_settings, train_from_tags
    from srdeploy.train.weak.pseudo_config import PseudoConfig

    if found_world().size > 1:
        raise UserError(
            "--supervision image runs in one process: make the masks with srdeploy pseudo first, "
            "then start torchrun on them"
        )
    if resume and force:
        raise UserError(
            "--resume and --force exclude each other: go on with the run, or replace it"
        )
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
