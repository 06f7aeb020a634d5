"""Self-regulation of any segmentation network, in training alone (ICCV 2021, arXiv 2108.09702).

    regulated = SelfRegulation(network, classes=21)
    optimizer = torch.optim.SGD(regulated.parameters(), lr=0.01)
    ...
    regulated.losses(images, labels, progress=step / steps).total.backward()

`regulated.network` is the very module that was given, and stays plain: save and deploy it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from srdeploy.errors import UserError
from srdeploy.models.tracing import PROBE_SIZE
from srdeploy.outputs import main_logits, resize_logits
from srdeploy.train import losses
from srdeploy.train.compiled import Compiled
from srdeploy.train.exits import Exits, make_exits
from srdeploy.train.own_exits import check_classes, find_own_exits
from srdeploy.train.regulation_config import RegulationConfig
from srdeploy.train.schedule import ramp
from srdeploy.train.taps import TapChoice, choose_taps, collected, feature_map, given_taps

DEFAULTS = RegulationConfig()


@dataclass(frozen=True)
class ExitOutputs:
    """What all exits say about a batch, shallow to deep; the last is the network's own output."""

    logits: list[Tensor]
    """[N, K, h, w] each, at the exit's own resolution."""
    class_logits: list[Tensor]
    """[N, K] each; empty for a baseline."""
    hidden: list[Tensor | None]
    """[N, C, h, w] each; None for the network's own output."""
    own: dict[str, Tensor] = field(default_factory=dict)
    """Logits [N, K, h, w] of the network's own further supervised heads (`own_exits`), by name;
    without those that the network runs in training mode alone and now left out."""


@dataclass(frozen=True)
class Losses:
    """One step's losses. They stay on the device: the caller chooses when to read them."""

    total: Tensor
    """What to call backward on."""
    terms: dict[str, Tensor]
    """The parts that went into the total, unweighted and detached: "main" always, "own" where the
    network has own_exits (with its weights in), "seg" and "cls" with exits, "srf" and "srl" once
    feedback began."""


class SelfRegulation(nn.Module):
    """A plain network and the exits that regulate its training.

    network: any module whose output `srdeploy.outputs.main_logits` understands, with `classes`
    channels. taps: module names, shallow to deep, or "auto": `settings.taps`, and where that is
    "auto" too, the network's `stages`, else the levels of its encoder, found by tracing a forward;
    `choice` says which and why. With `settings.enabled` False it is a baseline: no exits, and the
    same loss function without their terms. ignore_index: label of pixels that count for nothing.
    class_weights: float [K], weighs the cross-entropies against ground truth. probe_size: (H, W) of
    the blank image that the network is probed with, for networks that take certain sizes alone.
    own_exits: names of further heads to supervise, with their loss weights, or "auto": the
    network's `own_exits`, else its auxiliary heads that run in training and give maps of K classes,
    at `srdeploy.train.own_exits.AUXILIARY_WEIGHT` each.
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
        own_exits: Literal["auto"] | Mapping[str, float] = "auto",
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
        self.own_exits = find_own_exits(network, classes, own_exits, probe_size)
        check_classes(network, classes, self.own_exits, probe_size)
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
            with collected(self.network, (*self.taps, *self.own_exits)) as outputs:
                logits = main_logits(self.network(images))
        else:
            logits, outputs = faster.network(images)
        # A head that the network runs in training mode alone has nothing to say in evaluation.
        asked = (n for n in self.own_exits if n in outputs or self.network.training)
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

    def losses(self, images: Tensor, labels: Tensor, progress: float = 1.0) -> Losses:
        """One step's losses, ready for backward; usable under autocast.

        images: float32 [N, 3, H, W], normalised; labels: uint8 or int64 [N, H, W]; progress: share
        of the training that is done, 0..1, from which the feedback's strength follows.
        Raises UserError for labels of another size, and on the CPU for ids that are no class.
        """
        if labels.shape != (images.shape[0], *images.shape[2:]):
            raise UserError(
                f"labels of shape {tuple(labels.shape)} do not fit images of shape "
                f"{tuple(images.shape)}: they must be [N, H, W]"
            )
        return self.losses_of(self(images), labels, progress)

    def losses_of(self, outputs: ExitOutputs, labels: Tensor, progress: float = 1.0) -> Losses:
        """`losses` of outputs at hand, e.g. of a forward through DistributedDataParallel."""
        labels = labels.long()  # once for all terms; and uint8 would wrap a negative ignore_index
        self._check_ids(labels)
        with torch.autocast(labels.device.type, enabled=False):
            terms = {"main": self._full_size(outputs.logits[-1], labels)}
            weights = {"main": 1.0}
            for name, own in outputs.own.items():
                loss = self.own_exits[name] * self._full_size(own, labels)
                terms["own"] = terms["own"] + loss if "own" in terms else loss
                weights["own"] = 1.0
            if self.exits is not None:
                self._add_ground_truth(outputs, labels, terms, weights)
                self._add_feedback(outputs, labels, progress, terms, weights)
            total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        return Losses(total, {name: term.detach() for name, term in terms.items()})

    def _full_size(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy at the labels' size: the baseline's loss, one function for every run."""
        resized = resize_logits(logits.float(), (labels.shape[1], labels.shape[2]))
        return losses.pixel_cross_entropy(resized, labels, self.ignore_index, self.class_weights)

    def _add_ground_truth(
        self,
        outputs: ExitOutputs,
        labels: Tensor,
        terms: dict[str, Tensor],
        weights: dict[str, float],
    ) -> None:
        """MEA: each exit's segmenter and classifier against ground truth, at its resolution."""
        if self.settings.seg_weight > 0:
            terms["seg"] = self._exits_cross_entropy(outputs.logits[:-1], labels)
            weights["seg"] = self.settings.seg_weight
        if self.settings.cls_weight > 0:
            shown = losses.presence(labels, self.classes, self.ignore_index)
            labelled = losses.labelled_images(labels, self.ignore_index)
            terms["cls"] = _sum(
                [losses.classification(c, shown, labelled) for c in outputs.class_logits]
            )
            weights["cls"] = self.settings.cls_weight

    def _exits_cross_entropy(self, logits: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Sum of the exits' cross-entropies, each at its own size against labels brought there."""
        proportion = self.settings.labels == "proportion"
        targets: dict[tuple[int, int], Tensor] = {}  # most exits share one size
        found = []
        for one in logits:
            size = (one.shape[2], one.shape[3])
            if proportion:
                if size not in targets:
                    targets[size] = losses.count_labels(
                        labels, self.classes, size, self.ignore_index
                    )
                loss = losses.count_cross_entropy(one, targets[size], self.class_weights)
            else:
                if size not in targets:
                    targets[size] = losses.shrink_labels(labels, size)
                loss = losses.pixel_cross_entropy(
                    one, targets[size], self.ignore_index, self.class_weights
                )
            found.append(loss)
        return _sum(found)

    def _add_feedback(
        self,
        outputs: ExitOutputs,
        labels: Tensor,
        progress: float,
        terms: dict[str, Tensor],
        weights: dict[str, float],
    ) -> None:
        """SR-F from the shallowest exit, SR-L from the deepest, once the schedule lets them act."""
        settings = self.settings
        strength = ramp(progress, settings.start, settings.ramp)
        if strength * settings.srf_weight > 0:
            terms["srf"] = self._shallow_feedback(outputs, labels)
            weights["srf"] = strength * settings.srf_weight
        if strength * settings.srl_weight > 0:
            labelled = losses.labelled_images(labels, self.ignore_index)
            *students, teacher = outputs.class_logits
            terms["srl"] = _sum(
                [
                    losses.class_feedback(c, teacher, labelled, settings.temperature)
                    for c in students
                ]
            )
            weights["srl"] = strength * settings.srl_weight

    def _shallow_feedback(self, outputs: ExitOutputs, labels: Tensor) -> Tensor:
        """SR-F: the shallowest exit teaches all deeper ones (form "feature": of hidden maps)."""
        # The network's own output has no hidden map and so no part in the feature form.
        form, temperature = self.settings.srf_form, self.settings.temperature
        if form == "feature":
            maps = [one for one in outputs.hidden if one is not None]
            join = losses.pooled_to_student
        else:
            maps, join = outputs.logits, losses.on_one_grid
        found = []
        for deeper in maps[1:]:
            student, teacher = join(deeper, maps[0])
            shrunk = losses.shrink_labels(labels, (student.shape[2], student.shape[3]))
            valid = shrunk != self.ignore_index
            trusted = None
            if self.settings.srf_where == "right" and form != "feature":
                trusted = teacher.argmax(1) == shrunk
            if form == "hard":
                found.append(losses.hard_feedback(student, teacher, valid, trusted))
            elif form == "soft":
                found.append(losses.soft_feedback(student, teacher, valid, temperature, trusted))
            else:
                found.append(losses.feature_feedback(student, teacher, valid, temperature))
        return _sum(found)

    def _check_ids(self, labels: Tensor) -> None:
        """Refuses ids that are no class. On the CPU only: on a GPU it would wait for the device."""
        if labels.device.type != "cpu":
            return
        wrong = (labels != self.ignore_index) & ((labels < 0) | (labels >= self.classes))
        if bool(wrong.any()):
            raise UserError(
                f"labels hold the id {int(labels[wrong][0])}: ids are 0..{self.classes - 1}, "
                f"or {self.ignore_index} for pixels to ignore"
            )


def _sum(terms: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum()
