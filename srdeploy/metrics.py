"""Accuracy of label maps: IoU, pixel accuracy, and the two failures that self-regulation is for.

*Failure-1*, small things are missed: of the small connected components of the ground truth, the
fraction of which less than half the pixels are found.
*Failure-2*, minor parts of large things get another class: of the large components whose majority
is right, the share of pixels that another foreground class takes.

Both are taken over scored classes that are foreground: all but one named "background" or "void".
The definitions are ours, after the failure modes named in "Self-Regulation for Semantic
Segmentation" (ICCV 2021). K classes, T tallies, H height, W width.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from srdeploy.errors import UserError
from srdeploy.spec import Spec
from srdeploy.validation import Settings

if TYPE_CHECKING:
    from rich.table import Table

Labels = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.int64]

SMALL_SHARE = 0.01
"""A component below this share of the image's pixels is small."""
SPECK_PIXELS = 16
"""A component of fewer pixels is a speck, where the annotator's outline decides: it is left out."""
LARGE_SHARE = 0.05
"""A component of at least this share of the image's pixels is large."""
FOUND_RECALL = 0.5
"""A small component is missed below this recall; a large one's majority is right above it."""
NOT_FOREGROUND = frozenset({"background", "void"})
"""Class names that are no thing of their own."""

TALLIES = (
    "intersection",
    "true",
    "predicted",
    "small",
    "missed",
    "large",
    "large_pixels",
    "taken",
)
"""What is counted of each class, in the columns' order: pixels rightly predicted, of the class, and
predicted; small components, and those missed; large components whose majority is right, their
pixels, and those that another foreground class took. Tallies of images add up."""

MEASURES = ("miou", "failure1", "failure2")
"""What `measures` makes of tallies, in this order."""


class Scores(Settings):
    """Accuracy over a set of images; all shares in 0..1, None where nothing could be measured."""

    miou: float
    """Mean of the scored classes' IoU, over those present in the ground truth or predicted."""
    pixel_accuracy: float
    """Share of the scored pixels with the right class."""
    iou: dict[str, float | None]
    """Values by the name of each scored class."""
    failure1: float | None
    """Fraction of small components missed, all foreground classes together."""
    failure1_per_class: dict[str, float | None]
    failure2: float | None
    """Share of large components' pixels that another foreground class took."""
    failure2_per_class: dict[str, float | None]
    small_components: dict[str, int]
    """How many small components failure1_per_class rests on."""
    large_components: dict[str, int]
    """How many large components, with a right majority, failure2_per_class rests on."""
    images: int

    def table(self, title: str) -> "Table":
        """A table for people: one row per scored class, and all together; figures in percent."""
        from rich.table import Table

        table = Table(title=title, title_justify="left", show_footer=True)
        table.add_column("class", footer="all")
        table.add_column("IoU %", justify="right", footer=percent(self.miou))
        table.add_column("small missed %", justify="right", footer=percent(self.failure1))
        table.add_column("of", justify="right", footer=str(sum(self.small_components.values())))
        table.add_column("large confused %", justify="right", footer=percent(self.failure2))
        table.add_column("of", justify="right", footer=str(sum(self.large_components.values())))
        for name, iou in self.iou.items():
            table.add_row(
                name,
                percent(iou),
                percent(self.failure1_per_class.get(name)),
                str(self.small_components.get(name, "-")),
                percent(self.failure2_per_class.get(name)),
                str(self.large_components.get(name, "-")),
            )
        table.caption = f"{self.images} images, pixel accuracy {percent(self.pixel_accuracy)} %"
        return table


class Score:
    """Collects label maps and scores them, image by image; memory does not grow with the images."""

    confusion: Counts
    """int64 [K, K], rows the true class, columns the predicted one; scored pixels only."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        classes = spec.class_count
        self.confusion = np.zeros((classes, classes), np.int64)
        self.images = 0
        self._scored = np.zeros(256, np.bool_)
        self._scored[list(spec.scored_ids)] = True
        self._known = np.zeros(256, np.bool_)
        self._known[[*range(classes), spec.ignore_index]] = True
        self._foreground = [i for i in spec.scored_ids if spec.classes[i] not in NOT_FOREGROUND]
        self._is_foreground = np.zeros(classes, np.bool_)
        self._is_foreground[self._foreground] = True
        # Per class: small components, missed; large ones, their pixels, those taken by others.
        self._small = np.zeros((classes, 2), np.int64)
        self._large = np.zeros((classes, 3), np.int64)

    def update(self, labels: Labels, predicted: Labels) -> None:
        """Adds one image: true and predicted labels, both uint8 [H, W].

        True labels of classes that are not scored, and the ignore index, count for nothing.
        Raises UserError where shapes differ or a label is neither a class nor the ignore index.
        """
        if labels.shape != predicted.shape:
            raise UserError(
                f"the prediction has shape {predicted.shape}, its labels {labels.shape}: "
                "restore it to the labels' size first"
            )
        classes = self.spec.class_count
        self._refuse_unknown(labels)
        # One count of all 256 x K pairs would be slower than leaving the ignored pixels out first.
        scored = self._scored[labels]
        truth, guess = labels[scored], predicted[scored]
        if guess.size and int(guess.max()) >= classes:
            raise UserError(f"predicted label {guess.max()} is not one of {classes} classes")
        pairs = truth.astype(np.int64) * classes + guess
        counts = np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)
        self.confusion += counts
        self.images += 1
        present = counts.sum(axis=1)
        for index in self._foreground:
            if present[index] >= SPECK_PIXELS:
                self._count_components(labels == index, predicted, index)

    def counts(self) -> Counts:
        """Everything that was counted, int64 [n]: those of parts of the images add up."""
        parts = (self.confusion, self._small, self._large, np.array([self.images]))
        return np.concatenate([part.ravel() for part in parts])

    def set_counts(self, counts: Counts) -> None:
        """Takes `counts`, such as a sum over processes, for what was counted."""
        classes = self.spec.class_count
        ends = np.cumsum([classes * classes, classes * 2, classes * 3])
        confusion, small, large, images = np.split(counts, ends)
        self.confusion = confusion.reshape(classes, classes)
        self._small, self._large = small.reshape(classes, 2), large.reshape(classes, 3)
        self.images = int(images[0])

    def tallies(self) -> Counts:
        """All that was counted so far, int64 [K, T] with a column for each of TALLIES."""
        correct, true = self.confusion.diagonal(), self.confusion.sum(axis=1)
        predicted = self.confusion.sum(axis=0)
        return np.column_stack([correct, true, predicted, self._small, self._large])

    def result(self) -> Scores:
        """The scores so far. Raises UserError where no scored pixel has been seen."""
        total = int(self.confusion.sum())
        if total == 0:
            raise UserError(
                f"nothing to score: {self.images} images hold no pixel of a scored class"
            )
        correct = self.confusion.diagonal()
        union = self.confusion.sum(axis=0) + self.confusion.sum(axis=1) - correct
        names = self.spec.classes
        iou = {names[i]: _ratio(correct[i], union[i]) for i in self.spec.scored_ids}
        small, large = self._small, self._large
        miou, failure1, failure2 = measures(self.tallies(), self.spec)
        return Scores(
            miou=float(miou),
            pixel_accuracy=float(correct.sum() / total),
            iou=iou,
            failure1=_known(failure1),
            failure1_per_class={
                names[i]: _ratio(small[i, 1], small[i, 0]) for i in self._foreground
            },
            failure2=_known(failure2),
            failure2_per_class={
                names[i]: _ratio(large[i, 2], large[i, 1]) for i in self._foreground
            },
            small_components={names[i]: int(small[i, 0]) for i in self._foreground},
            large_components={names[i]: int(large[i, 0]) for i in self._foreground},
            images=self.images,
        )

    def _refuse_unknown(self, labels: Labels) -> None:
        unknown = ~self._known[labels]
        if unknown.any():
            raise UserError(
                f"label {labels[unknown][0]} is neither one of {self.spec.class_count} classes nor "
                f"the ignored label {self.spec.ignore_index}"
            )

    def _count_components(self, mask: npt.NDArray[np.bool_], predicted: Labels, index: int) -> None:
        """Adds the components of one class; `mask` is bool [H, W], true where the class is."""
        area = mask.size
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        components, count = connected_components(mask[box])
        inside = components > 0
        numbers, guess = components[inside], predicted[box][inside]
        sizes = np.bincount(numbers, minlength=count + 1)
        right = np.bincount(numbers[guess == index], minlength=count + 1)
        small = (sizes >= SPECK_PIXELS) & (sizes < SMALL_SHARE * area)
        self._small[index] += small.sum(), (small & (right < FOUND_RECALL * sizes)).sum()
        large = (sizes >= LARGE_SHARE * area) & (right > FOUND_RECALL * sizes)
        if large.any():
            other = self._is_foreground[guess] & (guess != index)
            taken = np.bincount(numbers[other], minlength=count + 1)
            self._large[index] += large.sum(), sizes[large].sum(), taken[large].sum()


def connected_components(mask: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int32], int]:
    """Numbers the 8-connected components of a mask bool [H, W].

    Returns int32 [H, W], 0 outside and 1.. inside, numbered by their first pixels in reading
    order, and how many there are. The same as scipy.ndimage.label with a full 3x3 structure, which
    the suite compares it with: scipy would be a third of what evaluation installs.
    """
    height, width = mask.shape
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    # Runs of set pixels along the rows, [starts, ends), as positions with room between the rows.
    positions = np.arange(height)[:, None] * (width + 2) + np.arange(width + 1)
    starts, ends = positions[edges == 1], positions[edges == -1]
    # A run touches those of the row above that end at or behind its start and begin at or before
    # its end: the diagonal neighbours are the "at".
    first = np.searchsorted(ends, starts - (width + 2), side="left").tolist()
    last = np.searchsorted(starts, ends - (width + 2), side="right").tolist()
    roots = list(range(len(starts)))

    def root(run: int) -> int:
        while roots[run] != run:
            roots[run] = run = roots[roots[run]]
        return run

    for run, (begin, end) in enumerate(zip(first, last, strict=True)):
        for above in range(begin, end):
            one, other = root(run), root(above)
            roots[max(one, other)] = min(one, other)
    distinct, numbers = np.unique([root(run) for run in roots], return_inverse=True)
    labels = np.zeros(mask.shape, np.int32)
    labels[mask] = np.repeat(numbers + 1, ends - starts)
    return labels, len(distinct)


def measures(tallies: npt.NDArray[Any], spec: Spec) -> npt.NDArray[np.float64]:
    """mIoU, Failure-1 and Failure-2 of summed tallies, the one definition of all three.

    tallies: whole numbers of any type [..., K, T], as of `Score.tallies`; any leading axes, e.g.
    one for resamples. Returns shares of 0..1 [..., 3] in the order of MEASURES, NaN where nothing
    could be measured.
    """
    counts = tallies.astype(np.float64)
    correct, true, predicted = np.moveaxis(counts[..., list(spec.scored_ids), :3], -1, 0)
    iou = _shares(correct, true + predicted - correct)
    there = ~np.isnan(iou)
    miou = _shares(np.where(there, iou, 0).sum(axis=-1), there.sum(axis=-1))
    # Components are counted only for foreground classes.
    _, _, _, small, missed, _, pixels, taken = np.moveaxis(counts.sum(axis=-2), -1, 0)
    return np.stack([miou, _shares(missed, small), _shares(taken, pixels)], axis=-1)


def percent(share: float | None) -> str:
    """A share of 0..1 in percent with two decimals; a dash for None."""
    return "-" if share is None else f"{100 * share:.2f}"


def _ratio(part: np.int64, whole: np.int64) -> float | None:
    return float(part / whole) if whole else None


def _shares(part: npt.NDArray[Any], whole: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """part / whole of any one shape, NaN where `whole` is 0."""
    nothing = np.full(np.shape(whole), np.nan)
    shares: npt.NDArray[np.float64] = np.divide(part, whole, out=nothing, where=whole > 0)
    return shares


def _known(share: np.float64) -> float | None:
    return None if np.isnan(share) else float(share)


class Interval(Settings):
    """An estimate with its interval; 95 % where nothing else is said."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"
