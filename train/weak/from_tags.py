"""From image tags to a trained network: pseudo masks, ordinary training on them, and further rounds
in which the trained network makes better masks (self-training)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srdeploy import console
from srdeploy.errors import UserError
from srdeploy.runs import is_run
from srdeploy.train.config import TrainConfig, merge
from srdeploy.train.loop import TrainResult, train
from srdeploy.train.run_folder import require_new
from srdeploy.train.weak.pseudo import make_pseudo
from srdeploy.train.weak.pseudo_run import SECTION, UNUSED, PseudoConfig, PseudoRun, parted
from srdeploy.validation import validated

CLASSIFIER = "classifier"
"""Keys of the classifier's training are given as classifier.KEY; those not given are the
segmenter's."""
MOST_ROUNDS = 9


@dataclass(frozen=True)
class WeakSettings:
    """The settings of training on tags, beside the segmenter's configuration."""

    classifier: dict[str, Any]
    """Keys in which the classifier's training differs."""
    pseudo: PseudoConfig
    labels_from_masks: bool
    rounds: int
    """Segmenters trained, each but the first on the masks that the one before it makes."""


@dataclass(frozen=True)
class Places:
    """Folders of one round."""

    pseudo: Path
    run: Path


def places(out: Path, rounds: int) -> list[Places]:
    """The folders of every round; the last round's run is `out`, the others lie beside it."""
    found = []
    for number in range(1, rounds + 1):
        run = out if number == rounds else out.with_name(f"{out.name}-round-{number}")
        masks = f"{out.name}-pseudo" if number == 1 else f"{out.name}-pseudo-{number}"
        found.append(Places(out.with_name(masks), run))
    return found


def split_settings(
    file: Path | None, settings: Sequence[str]
) -> tuple[dict[str, Any], list[str], dict[str, Any], dict[str, Any]]:
    """A configuration file and --set texts, parted: (the segmenter's values of the file, its
    settings, the classifier's values, PseudoConfig's values). Raises UserError."""
    content, rest, sections = parted(file, settings, [CLASSIFIER, SECTION])
    return content, rest, sections[CLASSIFIER], sections[SECTION]


def train_from_tags(
    config: TrainConfig, weak: WeakSettings, out: Path, resume: bool, force: bool
) -> TrainResult | None:
    """Trains as `config` says on pseudo masks of its data; None where Ctrl-C or SIGTERM stopped it
    before the last training.

    Round 1's pseudo masks go to OUT-pseudo. resume: continues from there. force: replaces what
    is there. Raises UserError.
    """
    if not 1 <= weak.rounds <= MOST_ROUNDS:
        raise UserError(f"--rounds {weak.rounds}: 1 to {MOST_ROUNDS}")
    config = config.model_copy(update={"data": config.data.resolve()})
    rounds = places(Path(out), weak.rounds)
    if not resume:
        for place in rounds:
            require_new(place.run, force)
    result: TrainResult | None = None
    teacher: Path | None = None
    for number, place in enumerate(rounds, start=1):
        console.say(f"round {number} of {len(rounds)}: pseudo masks in {place.pseudo}")
        run = PseudoRun(
            classifier=_classifier_config(config, weak),
            pseudo=weak.pseudo,
            labels_from_masks=weak.labels_from_masks,
            teacher=teacher,
        )
        if make_pseudo(run, place.pseudo, force=force) is None:
            console.warn("stopped, everything is saved; go on with the same command and --resume")
            return None
        going_on = resume and is_run(place.run)
        on_masks = config.model_copy(update={"data": place.pseudo})
        result = train(on_masks, place.run, going_on, force and not going_on)
        if not result.finished:
            return result
        teacher = place.run
    return result


def _classifier_config(config: TrainConfig, weak: WeakSettings) -> TrainConfig:
    """The segmenter's configuration with the classifier's own keys, and without those that have no
    meaning for it."""
    values = config.model_dump(mode="json")
    for key in UNUSED:
        values.pop(key, None)
    return validated(TrainConfig, merge(values, weak.classifier), "the classifier's settings")
