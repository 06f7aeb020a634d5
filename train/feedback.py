"""What exits teach each other: SR-F from the shallowest, SR-L from the deepest."""

from collections.abc import Sequence

from torch import Tensor

from srdeploy.train import losses
from srdeploy.train.regulation_config import RegulationConfig
from srdeploy.train.truth import Truth


def from_shallowest(
    logits: Sequence[Tensor],
    hidden: Sequence[Tensor | None],
    truth: Truth,
    settings: RegulationConfig,
) -> Tensor:
    """SR-F: the shallowest exit teaches all deeper ones -> scalar.

    logits: [N, K, h, w] each, shallow to deep; hidden: [N, C, h, w] each, which form "feature"
    compares; None for the network's own output, which so has no part in it.
    """
    form, temperature = settings.srf_form, settings.temperature
    if form == "feature":
        maps = [one for one in hidden if one is not None]
        join = losses.pooled_to_student
    else:
        maps, join = [*logits], losses.on_one_grid
    found = []
    for deeper in maps[1:]:
        student, teacher = join(deeper, maps[0])
        here = truth.shrunk((student.shape[2], student.shape[3]))
        valid, sure = here.valid, here.confidence
        trusted = None
        if settings.srf_where == "right" and form != "feature":
            trusted = teacher.argmax(1) == here.labels
        if form == "hard":
            loss = losses.hard_feedback(student, teacher, valid, trusted, sure)
        elif form == "soft":
            loss = losses.soft_feedback(student, teacher, valid, temperature, trusted, sure)
        else:
            loss = losses.feature_feedback(student, teacher, valid, temperature, sure)
        found.append(loss)
    return losses.added(found)


def from_deepest(
    class_logits: Sequence[Tensor], truth: Truth, settings: RegulationConfig
) -> Tensor:
    """SR-L: the network's own classifier teaches the exits' -> scalar. class_logits: [N, K] each,
    shallow to deep."""
    labelled = truth.labelled_images()
    *students, teacher = class_logits
    return losses.added(
        [losses.class_feedback(one, teacher, labelled, settings.temperature) for one in students]
    )
