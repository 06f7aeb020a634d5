"""What a batch's outputs are held against: its labels, and how sure they are."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from srdeploy.errors import UserError
from srdeploy.outputs import resize_logits
from srdeploy.train import losses


@dataclass(frozen=True)
class Truth:
    """Ground truth of a batch, as all losses of network and exits see it."""

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
        """Which pixels count, bool [N, H, W]."""
        return self.labels != self.ignore_index

    def shrunk(self, size: tuple[int, int]) -> "Truth":
        """At `size` (h, w): each cell takes the pixel under its centre."""
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
        nearest: dict[tuple[int, int], Truth] = {}  # most exits share one size
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
) -> Truth:
    """The truth of labels (uint8 or int64 [N, H, W]) and their confidence (uint8 [N, H, W]).

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
    return Truth(labels, classes, ignore_index, class_weights, confidence)


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
