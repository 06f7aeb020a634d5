"""Heads of the network's own that training supervises beside its main output."""

import math
from collections.abc import Mapping
from typing import Literal

from torch import nn

from srdeploy.errors import UserError
from srdeploy.models.auxiliary import find_auxiliary
from srdeploy.models.tracing import Size, trace
from srdeploy.train.taps import check_module

AUXILIARY_WEIGHT = 0.4
"""Loss weight of a foreign network's auxiliary head, as PSPNet and FCN trainings have it."""


def find_own_exits(
    network: nn.Module,
    classes: int,
    wanted: Literal["auto"] | Mapping[str, float],
    size: Size,
) -> dict[str, float]:
    """Names and loss weights of the heads: `wanted`, or for "auto" the network's `own_exits`, else
    its auxiliary heads that run in training and give maps of `classes` channels.

    Raises UserError for a module that the network lacks and for a weight that is no number >= 0.
    """
    if isinstance(wanted, str):
        if wanted != "auto":
            raise UserError(f"own_exits is '{wanted}': give \"auto\" or names with loss weights")
        named = getattr(network, "own_exits", None)
        if not isinstance(named, Mapping):
            heads = find_auxiliary(network, size)
            return {h.name: AUXILIARY_WEIGHT for h in heads if h.runs and h.classes == classes}
        wanted = named
    for name, weight in wanted.items():
        check_module(network, name, "supervise as an own exit")
        if not math.isfinite(weight) or weight < 0:
            raise UserError(f"own exit '{name}' has loss weight {weight}: 0 or more is needed")
    return dict(wanted)


def check_classes(
    network: nn.Module, classes: int, own_exits: Mapping[str, float], size: Size
) -> None:
    """Raises UserError where the main logits or an own exit have another number of channels than
    there are classes, and where an own exit does not run once and give a map [N, K, h, w]."""
    found = trace(network, size)
    if found.logits[1] != classes:
        raise UserError(
            f"the network gives {found.logits[1]} logits per pixel, but classes is {classes}"
        )
    visits = dict(found.visits)
    if not visits.keys() >= own_exits.keys():
        visits = {**trace(network, size, training=True).visits, **visits}
    for name in own_exits:
        visit = visits.get(name)
        if visit is None:
            raise UserError(f"own exit '{name}' did not run in the network's forward")
        if visit.calls > 1:
            raise UserError(
                f"own exit '{name}' runs {visit.calls} times in a forward: only its last output "
                "would be supervised"
            )
        if visit.shape is None or len(visit.shape) != 4:
            raise UserError(
                f"own exit '{name}' gives {visit.given}: logits [N, K, h, w] are needed"
            )
        if visit.shape[1] != classes:
            raise UserError(
                f"'{name}' of the network gives {visit.shape[1]} logits per pixel, but classes is "
                f"{classes}"
            )
