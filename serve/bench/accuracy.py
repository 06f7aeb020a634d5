"""Accuracy of artifacts against the first of them and against their own checkpoints, in one pass.

K classes, T tallies, H height, W width.
"""

import heapq
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from srdeploy import console
from srdeploy.imaging import Pixels
from srdeploy.metrics import MEASURES, TALLIES, Counts, Interval, Labels, Score, measures
from srdeploy.runtimes.base import Runtime
from srdeploy.serve.bench.results import AccuracyResult, AccuracyRow, CheckpointMatch
from srdeploy.serve.evaluate import photo_count, predict_labels, score_for
from srdeploy.spec import Spec
from srdeploy.validation import Settings

if TYPE_CHECKING:
    from srdeploy.data import DataSet

RESAMPLES = 2000
BATCH = 50
"""Resamples worked on at once: with 150 classes and 2000 photos, a megabyte or two."""
CONFIDENCE = 0.95
SEED = 0
ANYTHING = (-1.0, 1.0)
"""Every possible difference of two shares: the interval where nothing is known."""


class MatchLimits(Settings):
    """How far an export may stray from its checkpoint; shares of 0..1."""

    agreement: float
    """Least share of equal labels over all pixels of all photos."""
    miou: float
    """Of float32: largest difference of mIoU, either way. Of other types: how much lower mIoU may
    be; only a loss that is certain counts, since few photos hold few pixels of a rare class."""


MATCH_LIMITS: dict[str, MatchLimits] = {
    # Another order of summation moves logits by parts of a million. Parity leaves out pixels whose
    # two best classes are nearly tied, which labels don't show; and a graph that compares
    # features (max-unpooling) moves a value now and then, and its neighbourhood with it.
    "float32": MatchLimits(agreement=0.999, miou=1e-4),
    # 10 bits of mantissa; tf32 rounds its operands to them.
    "tf32": MatchLimits(agreement=0.995, miou=1e-3),
    "float16": MatchLimits(agreement=0.995, miou=1e-3),
    # 7 bits of mantissa: what differs lies on borders between classes.
    "bfloat16": MatchLimits(agreement=0.995, miou=1e-3),
    # 256 steps for a tensor's whole range.
    "int8": MatchLimits(agreement=0.95, miou=5e-3),
}
"""By the type's name in a runtime's precision: the limits that exports of each precision are
certified with, which a test holds equal."""


@dataclass(frozen=True)
class DifferingPhoto:
    """A photo on which the second artifact's labels differ from the first's."""

    name: str
    photo: Pixels
    """uint8 [H, W, 3]."""
    truth: Labels
    """uint8 [H, W]."""
    masks: tuple[Labels, ...]
    """Predicted, uint8 [H, W] at the photo's own size; one for each artifact."""
    differs: float
    """Share of pixels, 0..1."""


def measure_accuracy(
    runtimes: Sequence[Runtime],
    names: Sequence[str],
    dataset: "DataSet",
    limit: int | None,
    checkpoints: Sequence[tuple[str, Runtime] | None],
    pictures: int = 4,
) -> tuple[AccuracyResult, list[DifferingPhoto]]:
    """Runs every photo of `dataset` (or its first `limit`) once through every artifact.

    runtimes: open; the first is the baseline. names: one for each. checkpoints: for each, the name
    and open runtime of the run that it was exported from, where one is known; one runtime may stand
    in several places and runs once. pictures: how many photos to keep, those on which the second
    and the first differ most. Raises UserError where the classes differ, or where a photo or mask
    can't be used.
    """
    assert runtimes
    assert len(runtimes) == len(names) == len(checkpoints)
    known = [found[1] for found in checkpoints if found is not None]
    sides = {one: _Artifact(one, score_for(one, dataset)) for one in (*runtimes, *known)}
    first = sides[runtimes[0]]
    most = _MostDifferent(pictures)
    count = photo_count(dataset, limit)
    for index in console.track(range(count), "accuracy", count):
        item = dataset.items[index]
        photo, truth = dataset.read(index)
        labels = {one: predict_labels(one, photo, item.image) for one in sides}
        for side in sides.values():
            side.add(truth, labels)
        most.offer(item.name, photo, truth, [labels[runtime] for runtime in runtimes])
    rows: list[AccuracyRow] = []
    for runtime, name, source in zip(runtimes, names, checkpoints, strict=True):
        side, is_first = sides[runtime], not rows
        rows.append(
            AccuracyRow(
                name=name,
                scores=side.score.result(),
                checkpoint=None if source is None else side.match(source[0], sides[source[1]]),
                gains=None if is_first else paired_gains(side.photos, first.photos, first.spec),
                agreement=None if is_first else side.agreement(first),
            )
        )
    kept = most.photos()
    accuracy = AccuracyResult(
        data=str(dataset.root),
        split=dataset.split,
        images=count,
        rows=tuple(rows),
        most_different=tuple(photo.name for photo in kept),
    )
    return accuracy, kept


def paired_gains(ours: Counts, theirs: Counts, spec: Spec) -> dict[str, Interval]:
    """What `ours` measures minus what `theirs` does, with its interval, by the measure's name.

    ours, theirs: tallies of the same photos, int64 [photos, K, T]. A measure that one of them lacks
    is left out. Photos are drawn whole and for both alike, so that what makes a photo hard cancels.
    The interval is the percentile one, of the resamples in which the measure exists: BCa's
    acceleration leaves each photo out in turn, which a rare class that stands in one or two photos
    dominates, and isn't defined where nothing changes. Where fewer than two photos speak about a
    measure, it is -1..1.
    """
    both = np.stack([ours, theirs], axis=1)  # [photos, 2, K, T]
    gains = _gain(both.sum(axis=0), spec)
    informative = _informative(both)
    drawn = _resampled_gains(both, spec) if len(both) > 1 else np.empty((len(MEASURES), 0))
    tail = (1 - CONFIDENCE) / 2
    found = {}
    for name, gain, values, speaking in zip(MEASURES, gains, drawn, informative, strict=True):
        if np.isnan(gain):
            continue
        low, high = ANYTHING
        if speaking > 1:
            low, high = np.nanquantile(values, (tail, 1 - tail))
        found[name] = Interval(value=float(gain), low=float(low), high=float(high))
    return found


def limits_for(precision: str) -> MatchLimits:
    """The widest limits of the types in a runtime's precision, computed or stored.

    A type that isn't known widens nothing.
    """
    # "float32 (stored as float16)", "bfloat16+float32", "float32 (TF32 allowed)"
    named = [
        MATCH_LIMITS[one] for one in re.findall(r"\w+", precision.lower()) if one in MATCH_LIMITS
    ]
    return min([MATCH_LIMITS["float32"], *named], key=lambda limits: limits.agreement)


def _gain(sums: npt.NDArray[Any], spec: Spec) -> npt.NDArray[np.float64]:
    """sums [..., 2, K, T] of ours and theirs -> differences of the measures [..., 3]."""
    values = measures(sums, spec)
    difference: npt.NDArray[np.float64] = values[..., 0, :] - values[..., 1, :]
    return difference


def _informative(both: Counts) -> npt.NDArray[np.int64]:
    """On how many photos each measure rests, int64 [3], on the side that has fewer of them.

    both: tallies [photos, 2, K, T].
    """
    bases = [TALLIES.index(name) for name in ("true", "small", "large_pixels")]
    counts: npt.NDArray[np.int64] = (both[..., bases].sum(axis=2) > 0).sum(axis=0).min(axis=0)
    return counts


def _resampled_gains(both: Counts, spec: Spec) -> npt.NDArray[np.float64]:
    """Gains of resampled photos, float64 [3, RESAMPLES]; NaN where a measure does not exist.

    both: tallies [photos, 2, K, T], of two photos or more.
    """
    from scipy.stats import DegenerateDataWarning, bootstrap

    photos = len(both)
    flat = both.reshape(photos, -1).astype(np.float64)

    def gain(drawn: npt.NDArray[np.int64], axis: int) -> npt.NDArray[np.float64]:
        # How often each photo was drawn, times its tallies: copies of tallies would take gigabytes.
        # Whole numbers far below 2^53 are exact in float64, in any order of summation.
        rows = drawn.reshape(-1, photos).astype(np.int64)
        places = rows + photos * np.arange(len(rows))[:, None]
        times = np.bincount(places.ravel(), minlength=photos * len(rows))
        sums = times.reshape(-1, photos).astype(np.float64) @ flat
        gains = _gain(sums.reshape(-1, *both.shape[1:]), spec)
        return np.moveaxis(gains, -1, 0).reshape(len(MEASURES), *drawn.shape[:-1])

    with warnings.catch_warnings():
        # It concerns scipy's own interval, which NaN would spoil; ours leaves NaN out.
        warnings.simplefilter("ignore", DegenerateDataWarning)
        result = bootstrap(
            (np.arange(photos),),
            gain,
            vectorized=True,
            axis=-1,
            n_resamples=RESAMPLES,
            batch=BATCH,
            method="percentile",
            rng=SEED,
        )
    distribution: npt.NDArray[np.float64] = result.bootstrap_distribution
    return distribution


class _Artifact:
    """One artifact or checkpoint, photo by photo."""

    def __init__(self, runtime: Runtime, score: Score) -> None:
        self.runtime = runtime
        self.score = score
        self.spec = score.spec
        self._tallies: list[Counts] = []
        self._equal: Counter[Runtime] = Counter()
        self._pixels = 0

    def add(self, truth: Labels, labels: Mapping[Runtime, Labels]) -> None:
        """One photo: its true labels, and what every side predicted, uint8 [H, W] each."""
        before, own = self.score.tallies(), labels[self.runtime]
        self.score.update(truth, own)
        self._tallies.append(self.score.tallies() - before)
        self._pixels += own.size
        for other, theirs in labels.items():
            self._equal[other] += int((own == theirs).sum())

    @property
    def photos(self) -> Counts:
        """Tallies of each photo, int64 [photos, K, T]."""
        return np.stack(self._tallies)

    def agreement(self, other: "_Artifact") -> float:
        """Share of labels equal to the other's, over all pixels of all photos."""
        return self._equal[other.runtime] / self._pixels

    def match(self, name: str, checkpoint: "_Artifact") -> CheckpointMatch:
        """Whether this is what the checkpoint called `name` computes."""
        limits = limits_for(self.runtime.precision)
        agreement = self.agreement(checkpoint)
        difference = self.score.result().miou - checkpoint.score.result().miou
        kept = abs(difference) <= limits.miou
        if limits is not MATCH_LIMITS["float32"] and not kept:
            gain = paired_gains(self.photos, checkpoint.photos, self.spec)["miou"]
            kept = max(gain.value, gain.high) >= -limits.miou
        return CheckpointMatch(
            checkpoint=name,
            agreement=agreement,
            miou_difference=difference,
            passed=kept and agreement >= limits.agreement,
        )


class _MostDifferent:
    """Keeps the few photos on which the second artifact differs most from the first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._heap: list[tuple[float, int, DifferingPhoto]] = []  # the least different one first
        self._offered = 0

    def offer(self, name: str, photo: Pixels, truth: Labels, masks: Sequence[Labels]) -> None:
        """Takes the photo, or not; of equally different ones, the earlier stays."""
        self._offered += 1
        if len(masks) < 2:
            return
        differs = float((masks[1] != masks[0]).mean())
        if differs == 0:
            return
        one = DifferingPhoto(name, photo, truth, tuple(masks), differs)
        heapq.heappush(self._heap, (differs, -self._offered, one))
        if len(self._heap) > self._most:
            heapq.heappop(self._heap)

    def photos(self) -> list[DifferingPhoto]:
        """The most different first."""
        return [one for _, _, one in sorted(self._heap, key=lambda kept: kept[:2], reverse=True)]
