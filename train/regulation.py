"""Heads of the network's own that training supervises beside its main output."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from srdeploy.errors import UserError
from srdeploy.models.auxiliary import find_auxiliary
from srdeploy.models.tracing import PROBE_SIZE, Size, trace
from srdeploy.outputs import main_logits
from srdeploy.train import losses
from srdeploy.train.compiled import Compiled
from srdeploy.train.exits import (
    Exits,
    TapChoice,
    check_module,
    choose_taps,
    collected,
    feature_map,
    given_taps,
    make_exits,
)
from srdeploy.train.losses import Targets, from_deepest, from_shallowest, truth_of
from srdeploy.train.regulation_config import RegulationConfig, ramp

AUXILIARY_WEIGHT = 0.4
"""Loss weight of a foreign network's auxiliary head, as PSPNet and FCN trainings have it."""


def find_auxiliary_heads(
    network: nn.Module,
    classes: int,
    wanted: Literal["auto"] | Mapping[str, float],
    size: Size,
) -> dict[str, float]:
    """Names and loss weights of the heads: `wanted`, or for "auto" the network's `auxiliary_heads`,
    else its auxiliary heads that run in training and give maps of `classes` channels.

    Raises UserError for a module that the network lacks and for a weight that is no number >= 0.
    """
    if isinstance(wanted, str):
        if wanted != "auto":
            raise UserError(
                f"auxiliary_heads is '{wanted}': give \"auto\" or names with loss weights"
            )
        named = getattr(network, "auxiliary_heads", None)
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
    network: nn.Module, classes: int, auxiliary_heads: Mapping[str, float], size: Size
) -> None:
    """Raises UserError where the main logits or an own exit have another number of channels than
    there are classes, and where an own exit does not run once and give a map [N, K, h, w]."""
    found = trace(network, size)
    if found.logits[1] != classes:
        raise UserError(
            f"the network gives {found.logits[1]} logits per pixel, but classes is {classes}"
        )
    visits = dict(found.visits)
    if not visits.keys() >= auxiliary_heads.keys():
        visits = {**trace(network, size, training=True).visits, **visits}
    for name in auxiliary_heads:
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


# Self-regulation of any segmentation network (ICCV 2021, arXiv 2108.09702)

DEFAULTS = RegulationConfig()


@dataclass(frozen=True)
class ExitOutputs:
    """All exits' outputs for a batch, shallow to deep; the last is the network's own output."""

    logits: list[Tensor]
    """[N, K, h, w] each, at the exit's own resolution."""
    class_logits: list[Tensor]
    """[N, K] each; empty for a baseline."""
    hidden: list[Tensor | None]
    """[N, C, h, w] each; None for the network's own output."""
    own: dict[str, Tensor] = field(default_factory=dict)
    """Logits [N, K, h, w] of the network's own further supervised heads (`auxiliary_heads`), by
    name; without those that the network runs only in training mode and now left out."""


@dataclass(frozen=True)
class Losses:
    """One step's losses. They stay on the device: the caller chooses when to read them."""

    total: Tensor
    """The loss to call backward on."""
    terms: dict[str, Tensor]
    """The parts that went into the total, unweighted and detached: "main" always, "own" where the
    network has auxiliary_heads (with its weights in), "seg" and "cls" with exits, "srf" and "srl"
    once feedback began."""


class SelfRegulation(nn.Module):
    """A plain network and the exits that regulate its training.

    network: any module whose output `srdeploy.outputs.main_logits` understands, with `classes`
    channels. taps: module names, shallow to deep, or "auto": `settings.taps`, and where that is
    "auto" too, the network's `stages`, else the levels of its encoder, found by tracing a forward;
    `choice` says which and why. With `settings.enabled` False it is a baseline: no exits, and the
    same loss function without their terms. ignore_index: label of pixels that count for nothing.
    class_weights: float [K], weighs the cross-entropies against ground truth. probe_size: (H, W) of
    the blank image that the network is probed with, for networks that take only certain sizes.
    auxiliary_heads: names of further heads to supervise, with their loss weights, or "auto": the
    network's `auxiliary_heads`, else its auxiliary heads that run in training and give maps of K
    classes, at `srdeploy.train.regulation.AUXILIARY_WEIGHT` each.
    Raises UserError for taps that can't be read and for a network of another number of classes.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        classes: int,
        taps: str | Sequence[str] = "auto",
        settings: RegulationConfig = DEFAULTS,
        ignore_index: int = 255,
        class_weights: Tensor | None = None,
        probe_size: tuple[int, int] = PROBE_SIZE,
        auxiliary_heads: Literal["auto"] | Mapping[str, float] = "auto",
    ) -> None:
        super().__init__()
        if not 2 <= classes <= 255:
            raise UserError(f"classes is {classes}: between 2 and 255 are needed")
        if 0 <= ignore_index < classes:
            raise UserError(
                f"ignore_index {ignore_index} is also the id of a class (0..{classes - 1})"
            )
        if class_weights is not None and class_weights.shape != (classes,):
            raise UserError(
                f"class_weights has shape {tuple(class_weights.shape)}, not ({classes},)"
            )
        self.network = network
        self.classes = classes
        self.settings = settings
        self.ignore_index = ignore_index
        weights = None if class_weights is None else class_weights.detach().float()
        self.register_buffer("class_weights", weights, persistent=False)
        self.auxiliary_heads = find_auxiliary_heads(network, classes, auxiliary_heads, probe_size)
        check_classes(network, classes, self.auxiliary_heads, probe_size)
        self.choice: TapChoice | None = None
        """The taps, their maps and why they were chosen; None for a baseline."""
        self.compiled: Compiled | None = None  # set while `compiled` is open
        self.exits: Exits | None = None
        if settings.enabled:
            names = settings.taps if taps == "auto" else taps
            if names == "auto":
                self.choice = choose_taps(network, probe_size)
            else:
                self.choice = given_taps(network, names, probe_size)
            maps = self.choice.maps
            self.exits = make_exits(
                [one.channels for one in maps],
                [one.stride for one in maps],
                classes,
                settings,
                next(network.parameters(), torch.empty(0)),
            )
            if settings.srf_form == "feature" and settings.srf_weight > 0 and len(self.taps) < 2:
                raise UserError(
                    "srf_form 'feature' needs two taps or more: the network has no hidden map"
                )

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the modules that exits read, shallow to deep; none for a baseline."""
        return () if self.choice is None else self.choice.names

    def forward(self, images: Tensor) -> ExitOutputs:
        """images float32 [N, 3, H, W], normalised -> all exits' outputs; a baseline's last one.

        Raises UserError where a map can't be read at this size, and in training where an exit has
        one value per channel, which BatchNorm can't be trained on.
        """
        faster = self.compiled if self.training else None
        if faster is None:
            with collected(self.network, (*self.taps, *self.auxiliary_heads)) as outputs:
                logits = main_logits(self.network(images))
        else:
            logits, outputs = faster.network(images)
        # A head that the network runs only in training mode has nothing to say in evaluation.
        asked = (n for n in self.auxiliary_heads if n in outputs or self.network.training)
        own = {name: feature_map(outputs, name) for name in asked}
        if self.exits is None or self.choice is None:
            return ExitOutputs([logits], [], [None], own)
        size = (images.shape[2], images.shape[3])
        maps = [feature_map(outputs, one.name, one, size) for one in self.choice.maps]
        if self.exits.training:
            self.exits.check_cells(maps, self.taps)
        found = self.exits(maps) if faster is None else faster.exits(maps)
        return ExitOutputs(
            logits=[*(one.logits for one in found), logits],
            class_logits=[*(one.class_logits for one in found), self.exits.classify(logits)],
            hidden=[*(one.hidden for one in found), None],
            own=own,
        )

    def losses(
        self,
        images: Tensor,
        labels: Tensor,
        progress: float = 1.0,
        confidence: Tensor | None = None,
    ) -> Losses:
        """One step's losses, ready for backward; usable under autocast.

        images: float32 [N, 3, H, W], normalised; labels: uint8 or int64 [N, H, W]; progress: share
        of the training that is done, 0..1, from which the feedback's strength follows; confidence:
        uint8 [N, H, W], how much each label counts, 255 in full and 0 like an ignored one; None:
        all in full. It weighs the cross-entropies against ground truth and SR-F.
        Raises UserError for labels or a confidence of another size, and on the CPU for ids that are
        no class.
        """
        if labels.shape != (images.shape[0], *images.shape[2:]):
            raise UserError(
                f"labels of shape {tuple(labels.shape)} do not fit images of shape "
                f"{tuple(images.shape)}: they must be [N, H, W]"
            )
        return self.losses_of(self(images), labels, progress, confidence)

    def losses_of(
        self,
        outputs: ExitOutputs,
        labels: Tensor,
        progress: float = 1.0,
        confidence: Tensor | None = None,
    ) -> Losses:
        """`losses` of outputs at hand, e.g. of a forward through DistributedDataParallel."""
        targets = truth_of(labels, self.classes, self.ignore_index, self.class_weights, confidence)
        with torch.autocast(labels.device.type, enabled=False):
            terms = {"main": targets.cross_entropy(outputs.logits[-1])}
            weights = {"main": 1.0}
            for name, own in outputs.own.items():
                loss = self.auxiliary_heads[name] * targets.cross_entropy(own)
                terms["own"] = terms["own"] + loss if "own" in terms else loss
                weights["own"] = 1.0
            if self.exits is not None:
                self._add_ground_truth(outputs, targets, terms, weights)
                self._add_feedback(outputs, targets, progress, terms, weights)
            total = losses.added([weights[name] * term for name, term in terms.items()])
        return Losses(total, {name: term.detach() for name, term in terms.items()})

    def _add_ground_truth(
        self,
        outputs: ExitOutputs,
        targets: Targets,
        terms: dict[str, Tensor],
        weights: dict[str, float],
    ) -> None:
        """MEA: each exit's segmenter and classifier against ground truth, at its resolution."""
        settings = self.settings
        if settings.seg_weight > 0:
            proportion = settings.labels == "proportion"
            terms["seg"] = targets.exits_cross_entropy(outputs.logits[:-1], proportion)
            weights["seg"] = settings.seg_weight
        if settings.cls_weight > 0:
            shown, labelled = targets.presence(), targets.labelled_images()
            terms["cls"] = losses.added(
                [losses.classification(c, shown, labelled) for c in outputs.class_logits]
            )
            weights["cls"] = settings.cls_weight

    def _add_feedback(
        self,
        outputs: ExitOutputs,
        targets: Targets,
        progress: float,
        terms: dict[str, Tensor],
        weights: dict[str, float],
    ) -> None:
        """SR-F from the shallowest exit, SR-L from the deepest, once the schedule lets them act."""
        settings = self.settings
        strength = ramp(progress, settings.start, settings.ramp)
        if strength * settings.srf_weight > 0:
            terms["srf"] = from_shallowest(outputs.logits, outputs.hidden, targets, settings)
            weights["srf"] = strength * settings.srf_weight
        if strength * settings.srl_weight > 0:
            terms["srl"] = from_deepest(outputs.class_logits, targets, settings)
            weights["srl"] = strength * settings.srl_weight
