"""The losses of self-regulation, as pure functions (ICCV 2021, arXiv 2108.09702).

Shapes: N batch, K classes, C channels, H and W label size, h and w an exit's size. Everything is
computed in float32 whatever comes in. Pixels labelled `ignore_index` count for nothing; where no
pixel is left the loss is exactly 0 with zero gradients. Teachers are detached where they are used.

confidence: uint8, of the labels' shape; a pixel counts as confidence / 255 of one, in the mean's
denominator too. None: all are certain, which is the same as 255 everywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from srdeploy.errors import UserError
from srdeploy.outputs import resize_logits
from srdeploy.train import losses
from srdeploy.train.regulation_config import RegulationConfig

TINY = 2.0**-64
"""Least denominator: 0 / TINY is 0, and any real sum of weights is larger. Gradients that are
divided by it stay finite, so that 0 times them is 0."""
CERTAIN = 255
"""The confidence of a pixel that counts as one."""


def shrink_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Integer labels [N, H, W] at `size` (h, w): each cell takes the pixel under its centre.

    The indices are exact integers, as in 'nearest-exact'; plain 'nearest' takes each cell's upper
    left pixel and so trains an exit on labels that are half a cell off.
    """
    height, width = labels.shape[-2:]
    if (height, width) == tuple(size):
        return labels
    rows = _centres(size[0], height, labels.device)
    columns = _centres(size[1], width, labels.device)
    return labels[:, rows[:, None], columns]


def count_labels(
    labels: Tensor,
    classes: int,
    size: tuple[int, int],
    ignore_index: int,
    confidence: Tensor | None = None,
) -> Tensor:
    """How many pixels of each class every cell holds: labels [N, H, W] -> float32 [N, K, h, w].

    Each pixel is counted in the one cell that its centre lies in, as much as its confidence
    [N, H, W] says; ignored pixels in none.
    """
    batch, height, width = labels.shape
    rows = _centres(height, size[0], labels.device)
    columns = _centres(width, size[1], labels.device)
    cells = rows[:, None] * size[1] + columns
    valid = labels != ignore_index
    known = torch.where(valid, labels, 0).long()
    images = torch.arange(batch, device=labels.device)[:, None, None]
    places = (images * classes + known) * (size[0] * size[1]) + cells
    counts = torch.zeros(batch * classes * size[0] * size[1], device=labels.device)
    # Sums of whole numbers are exact in float32 up to 2**24 (65 793 certain pixels a cell and
    # class), so their order does not matter: deterministic on GPUs too.
    amounts = valid if confidence is None else torch.where(valid, confidence, 0)
    counts.scatter_add_(0, places.flatten(), amounts.flatten().float())
    counts = counts.view(batch, classes, *size)
    return counts if confidence is None else counts / CERTAIN


def presence(labels: Tensor, classes: int, ignore_index: int) -> Tensor:
    """Which classes an image shows: labels [N, H, W] -> float32 [N, K] of 0 and 1.

    Class 0 counts like any other; ignored pixels count for no class.
    """
    flat = labels.flatten(1)
    places = torch.where(flat == ignore_index, classes, flat).long()
    shown = torch.zeros(labels.shape[0], classes + 1, device=labels.device)
    return shown.scatter_(1, places, 1.0)[:, :classes]


def pixel_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    class_weights: Tensor | None = None,
    confidence: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy over valid pixels: logits [N, K, H, W], labels [N, H, W] -> scalar.

    With `class_weights` [K] it is the weighted mean, sum(w * ce) / sum(w), as in torch; with
    `confidence` [N, H, W] too, and with both w is their product.
    """
    # Not reduction="mean": that is NaN without valid pixels, and not deterministic on CUDA.
    losses = functional.cross_entropy(
        logits.float(),
        labels.long(),
        weight=None if class_weights is None else class_weights.float(),
        ignore_index=ignore_index,
        reduction="none",
    )
    valid = labels != ignore_index
    if class_weights is None:
        share = _amount(valid, confidence)
    else:
        weights = class_weights.float()[torch.where(valid, labels, 0).long()]
        share = torch.where(valid, _weighed(weights, confidence), 0).sum().clamp(min=TINY)
    return _weighed(losses, confidence).sum() / share


def count_cross_entropy(
    logits: Tensor, counts: Tensor, class_weights: Tensor | None = None
) -> Tensor:
    """Cross-entropy of logits [N, K, h, w] against `count_labels`' [N, K, h, w] -> scalar.

    Every labelled pixel weighs the same, so this equals `pixel_cross_entropy` at full size of
    logits that are constant in each cell, without ever making them.
    """
    weighted = counts if class_weights is None else counts * class_weights.float()[:, None, None]
    losses = weighted * functional.log_softmax(logits.float(), dim=1)
    return -losses.sum() / weighted.sum().clamp(min=TINY)


def classification(class_logits: Tensor, targets: Tensor, labelled: Tensor) -> Tensor:
    """Multi-label loss: class_logits [N, K], targets [N, K] in 0..1 -> scalar.

    Binary cross-entropy on logits, mean over classes and over the images that are `labelled`
    (bool [N]): an image without a valid pixel says nothing about what it shows.
    """
    losses = functional.binary_cross_entropy_with_logits(
        class_logits.float(), targets.float(), reduction="none"
    ).mean(1)
    return _masked_mean(losses, labelled)


def hard_feedback(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor,
    trusted: Tensor | None = None,
    confidence: Tensor | None = None,
) -> Tensor:
    """SR-F on labels: cross-entropy against the teacher's argmax.

    student, teacher: logits [N, K, h, w] on one grid (`on_one_grid`); valid: bool [N, h, w];
    trusted: bool [N, h, w], the pixels at which the teacher is believed, None: all. The others lose
    nothing, and count in the mean. confidence: uint8 [N, h, w].
    """
    labels = teacher.detach().argmax(1)
    losses = functional.cross_entropy(student.float(), labels, reduction="none")
    return _masked_mean(_where(trusted, losses), valid, confidence)


def soft_feedback(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor,
    temperature: float,
    trusted: Tensor | None = None,
    confidence: Tensor | None = None,
) -> Tensor:
    """SR-F on probabilities: t^2 KL(softmax(teacher / t) || softmax(student / t)).

    student, teacher: logits [N, K, h, w] on one grid; valid, trusted, confidence: [N, h, w], as in
    `hard_feedback`. The divergence is summed over classes and averaged over valid pixels.
    """
    expected = functional.log_softmax(teacher.detach().float() / temperature, dim=1)
    found = functional.log_softmax(student.float() / temperature, dim=1)
    losses = functional.kl_div(found, expected, reduction="none", log_target=True).sum(1)
    return temperature**2 * _masked_mean(_where(trusted, losses), valid, confidence)


def feature_feedback(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor,
    temperature: float,
    confidence: Tensor | None = None,
) -> Tensor:
    """SR-F on hidden maps: each channel of the student is to look where the teacher's looks.

    student, teacher: [N, C, h, w] on one grid; valid: bool [N, h, w]. Each channel's map becomes a
    distribution over the valid positions, softmax(map / t); the loss is t^2 KL(teacher || student),
    summed over positions and averaged over channels and over images with a valid position.
    confidence: uint8 [N, h, w], multiplies both distributions at its position before they are made
    to add up to 1: a mean of the divergence's terms, weighted, would be no divergence.
    """
    if confidence is not None:
        valid = valid & (confidence > 0)
    mask = valid.flatten(1)[:, None]
    # The lowest finite number, not -inf: an image without valid positions would turn into NaN.
    lowest = torch.finfo(torch.float32).min
    expected = _with_prior(teacher.detach().float().flatten(2) / temperature, confidence)
    expected = functional.log_softmax(expected.masked_fill(~mask, lowest), dim=2)
    found = _with_prior(student.float().flatten(2) / temperature, confidence)
    found = functional.log_softmax(found.masked_fill(~mask, lowest), dim=2)
    losses = functional.kl_div(found, expected, reduction="none", log_target=True)
    losses = torch.where(mask, losses, 0).sum(2).mean(1)
    return temperature**2 * _masked_mean(losses, valid.flatten(1).any(1))


def class_feedback(
    student: Tensor, teacher: Tensor, labelled: Tensor, temperature: float
) -> Tensor:
    """SR-L: t^2 BCE(student / t, sigmoid(teacher / t)); class logits [N, K] -> scalar.

    Mean over classes and over the images that are `labelled` (bool [N]).
    """
    targets = torch.sigmoid(teacher.detach().float() / temperature)
    return temperature**2 * classification(student.float() / temperature, targets, labelled)


def on_one_grid(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both logits [N, K, ., .] on the coarser of their grids, per axis; the finer is interpolated.

    Bilinear with half-pixel centres reads the finer map at the coarser cells' centres, where
    `shrink_labels` reads the labels too. So no shift comes between teacher, student and mask.
    """
    size = _coarser(student, teacher)
    return resize_logits(student.float(), size), resize_logits(teacher.detach().float(), size)


def pooled_to_student(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both hidden maps [N, C, ., .] on the coarser of their grids, the teacher averaged."""
    size = _coarser(student, teacher)
    averaged = functional.adaptive_avg_pool2d(teacher.detach().float(), size)
    return resize_logits(student.float(), size), averaged


def labelled_images(labels: Tensor, ignore_index: int) -> Tensor:
    """Which images have a valid pixel: labels [N, H, W] -> bool [N]."""
    return (labels != ignore_index).flatten(1).any(1)


def added(terms: Sequence[Tensor]) -> Tensor:
    """The sum of scalars."""
    return torch.stack(list(terms)).sum()


def _weighed(values: Tensor, confidence: Tensor | None) -> Tensor:
    """`values` times each pixel's confidence, of equal shape."""
    return values if confidence is None else values * (confidence.float() / CERTAIN)


def _amount(valid: Tensor, confidence: Tensor | None) -> Tensor:
    """What the valid pixels (bool) weigh together, a scalar: their number, where all are certain.
    At least 1 / 255, the least that a pixel can weigh, so that it can divide."""
    if confidence is None:
        return valid.sum().clamp(min=1)
    # Summed as whole numbers and divided in float64: 255 everywhere is the very number of pixels.
    whole = torch.where(valid, confidence, 0).sum()
    return (whole.double() / CERTAIN).float().clamp(min=1 / CERTAIN)


def _with_prior(maps: Tensor, confidence: Tensor | None) -> Tensor:
    """Maps [N, C, h * w] plus the logarithm of each position's confidence, where there is any."""
    if confidence is None:
        return maps
    prior = confidence.flatten(1)[:, None].clamp(min=1).float() / CERTAIN
    return maps + prior.log()


def _where(trusted: Tensor | None, losses: Tensor) -> Tensor:
    return losses if trusted is None else torch.where(trusted, losses, 0)


def _masked_mean(losses: Tensor, valid: Tensor, confidence: Tensor | None = None) -> Tensor:
    """Mean of `losses` where `valid` holds, weighted by `confidence`, all of equal shape; 0 where
    it holds nowhere."""
    weighed = _weighed(losses, confidence)
    return torch.where(valid, weighed, 0).sum() / _amount(valid, confidence)


def _centres(size: int, other: int, device: torch.device) -> Tensor:
    """For each of `size` cells which of `other` cells its centre lies in: int64 [size]."""
    return ((2 * torch.arange(size, device=device) + 1) * other) // (2 * size)


def _coarser(a: Tensor, b: Tensor) -> tuple[int, int]:
    return min(a.shape[-2], b.shape[-2]), min(a.shape[-1], b.shape[-1])


# Targets: the labels of a batch and their confidence


@dataclass(frozen=True)
class Targets:
    """Ground targets of a batch, as all losses of network and exits see it."""

    labels: Tensor
    """int64 [N, H, W]: 0 .. classes - 1, or ignore_index."""
    classes: int
    ignore_index: int
    class_weights: Tensor | None = None
    """float32 [K]."""
    confidence: Tensor | None = None
    """uint8 [N, H, W], 255 is certain; None: all are."""

    @property
    def valid(self) -> Tensor:
        """The mask of the pixels that count, bool [N, H, W]."""
        return self.labels != self.ignore_index

    def shrunk(self, size: tuple[int, int]) -> "Targets":
        """The labels at `size` (h, w): each cell takes the pixel under its centre."""
        sure = None if self.confidence is None else losses.shrink_labels(self.confidence, size)
        return replace(self, labels=losses.shrink_labels(self.labels, size), confidence=sure)

    def cross_entropy(self, logits: Tensor) -> Tensor:
        """Of logits [N, K, ., .] at the labels' size: the baseline's loss, one function for every
        run."""
        resized = resize_logits(logits.float(), (self.labels.shape[1], self.labels.shape[2]))
        return losses.pixel_cross_entropy(
            resized, self.labels, self.ignore_index, self.class_weights, self.confidence
        )

    def exits_cross_entropy(self, logits: Sequence[Tensor], proportion: bool) -> Tensor:
        """Sum of the exits' cross-entropies, each at its own size against labels brought there: the
        nearest, or the cells' proportions of classes."""
        nearest: dict[tuple[int, int], Targets] = {}  # most exits share one size
        counts: dict[tuple[int, int], Tensor] = {}
        found = []
        for one in logits:
            size = (one.shape[2], one.shape[3])
            if proportion:
                if size not in counts:
                    counts[size] = losses.count_labels(
                        self.labels, self.classes, size, self.ignore_index, self.confidence
                    )
                loss = losses.count_cross_entropy(one, counts[size], self.class_weights)
            else:
                if size not in nearest:
                    nearest[size] = self.shrunk(size)
                loss = nearest[size].cross_entropy(one)
            found.append(loss)
        return losses.added(found)

    def presence(self) -> Tensor:
        """Which classes an image shows, float32 [N, K] of 0 and 1."""
        return losses.presence(self.labels, self.classes, self.ignore_index)

    def labelled_images(self) -> Tensor:
        """Which images have a valid pixel, bool [N]."""
        return losses.labelled_images(self.labels, self.ignore_index)


def truth_of(
    labels: Tensor,
    classes: int,
    ignore_index: int,
    class_weights: Tensor | None = None,
    confidence: Tensor | None = None,
) -> Targets:
    """The targets of labels (uint8 or int64 [N, H, W]) and their confidence (uint8 [N, H, W]).

    Raises UserError for a confidence of another shape or type, and on the CPU for ids that are no
    class.
    """
    labels = labels.long()  # once for all terms; and uint8 would wrap a negative ignore_index
    _check_ids(labels, classes, ignore_index)
    if confidence is not None:
        if confidence.shape != labels.shape or confidence.dtype != torch.uint8:
            raise UserError(
                f"confidence is {confidence.dtype} of shape {tuple(confidence.shape)}: it must be "
                f"torch.uint8 (255 = certain) of the labels' shape, {tuple(labels.shape)}"
            )
        # Nothing may be learnt from such a pixel: not even that its class is in the image.
        labels = torch.where(confidence > 0, labels, ignore_index)
    return Targets(labels, classes, ignore_index, class_weights, confidence)


def _check_ids(labels: Tensor, classes: int, ignore_index: int) -> None:
    """Refuses ids that are no class. On the CPU only: on a GPU it would wait for the device."""
    if labels.device.type != "cpu":
        return
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= classes))
    if bool(wrong.any()):
        raise UserError(
            f"labels hold the id {int(labels[wrong][0])}: ids are 0..{classes - 1}, "
            f"or {ignore_index} for pixels to ignore"
        )


# Feedback between exits: SR-F from the shallowest, SR-L from the deepest


def from_shallowest(
    logits: Sequence[Tensor],
    hidden: Sequence[Tensor | None],
    targets: Targets,
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
        here = targets.shrunk((student.shape[2], student.shape[3]))
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
    class_logits: Sequence[Tensor], targets: Targets, settings: RegulationConfig
) -> Tensor:
    """SR-L: the network's own classifier teaches the exits' -> scalar. class_logits: [N, K] each,
    shallow to deep."""
    labelled = targets.labelled_images()
    *students, teacher = class_logits
    return losses.added(
        [losses.class_feedback(one, teacher, labelled, settings.temperature) for one in students]
    )
