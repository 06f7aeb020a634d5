"""Accuracy of an artifact on a labelled split, at the photos' own size."""

from pathlib import Path
from typing import TYPE_CHECKING

from srdeploy import console
from srdeploy.errors import UserError
from srdeploy.imaging import Pixels, fit, restore
from srdeploy.metrics import Score, Scores
from srdeploy.runtimes.base import Runtime

if TYPE_CHECKING:
    from srdeploy.data import DataSet


def evaluate(runtime: Runtime, dataset: "DataSet", limit: int | None = None) -> Scores:
    """Runs every photo of `dataset` (or its first `limit`) through `runtime`, which must be open.

    Each photo is fitted as the artifact's spec says; the labels are restored to the mask's size
    before they are scored. The data set decides which classes count and which label is ignored.
    Raises UserError where the classes differ, or where a photo or mask can't be used.
    """
    score = score_for(runtime, dataset)
    count = photo_count(dataset, limit)
    for index in console.track(range(count), f"evaluate {runtime.path.name}", count):
        photo, labels = dataset.read(index)
        score.update(labels, predict_labels(runtime, photo, dataset.items[index].image))
    return score.result()


def score_for(runtime: Runtime, dataset: "DataSet") -> Score:
    """An empty score for `runtime` on `dataset`. Raises UserError where the classes differ."""
    check_same_classes(runtime, dataset)
    # The names are equal; the data set decides what is scored.
    return Score(
        runtime.spec.model_copy(
            update={
                "ignore_index": dataset.classes.ignore_index,
                "scored": dataset.classes.scored,
            }
        )
    )


def photo_count(dataset: "DataSet", limit: int | None) -> int:
    """Number of photos that are scored: the first `limit`, or all."""
    return len(dataset) if limit is None else min(limit, len(dataset))


def predict_labels(runtime: Runtime, photo: Pixels, path: Path) -> Pixels:
    """photo uint8 [H, W, 3], read from `path` -> labels uint8 [H, W] at the photo's own size.

    Raises UserError naming the path where the artifact can't take the photo.
    """
    try:
        labels = runtime.run(fit(photo, runtime.spec)[None])[0]
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return restore(labels, photo.shape[0], photo.shape[1])


def check_same_classes(runtime: Runtime, dataset: "DataSet") -> None:
    """Raises UserError if artifact and data set do not have the same classes in the same order."""
    ours, theirs = runtime.spec.classes, dataset.classes.names
    if len(ours) != len(theirs):
        raise UserError(
            f"{runtime.path} has {len(ours)} classes ({_some(ours)}), {dataset.root} has "
            f"{len(theirs)} ({_some(theirs)}): they can't be compared"
        )
    for index, (own, other) in enumerate(zip(ours, theirs, strict=True)):
        if own != other:
            raise UserError(
                f"class {index} is '{own}' in {runtime.path} and '{other}' in {dataset.root}: "
                "they can't be compared"
            )


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
