"""What `srdeploy inspect RUN IMAGE` shows, as data: runs, photos, what each exit sees in them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from srdeploy.console import track
from srdeploy.errors import UserError
from srdeploy.imaging import Pixels, fit, read_labels, read_photo, restore, scaled_size
from srdeploy.metrics import Score, percent
from srdeploy.models.tracing import PROBE_SIZE
from srdeploy.runs import Run, load_trained, open_run
from srdeploy.spec import Spec
from srdeploy.studies.with_exits import attach_exits, regulation_of
from srdeploy.train.device import find_device
from srdeploy.train.pictures import ExitView, view_exits
from srdeploy.train.regulation import SelfRegulation

if TYPE_CHECKING:
    from rich.table import Table

SHOWN = 640
"""Longest side of the pictures shown, pixels; smaller photos keep their size."""
TOP = 12
"""Classes whose scores are shown, at most."""
PRESENT = 0.005
"""Share of the pixels from which a class counts as being in an image."""


@dataclass(frozen=True)
class Subject:
    """A run whose exits are looked at."""

    run: Run
    regulated: SelfRegulation
    trained: bool
    """False for a baseline: its exits are fresh and only show what its taps give."""

    @property
    def note(self) -> str:
        """What is absent and why, in one line; '' where nothing is."""
        settings = self.regulated.settings
        if not self.trained:
            return (
                "A baseline run: no exit was trained on it, so its taps show only their features."
            )
        absent = []
        if settings.seg_weight == 0:
            absent.append("segmenters (seg_weight is 0)")
        if settings.cls_weight == 0:
            absent.append("classifiers (cls_weight is 0)")
        return f"Trained without {' and '.join(absent)}: they are not shown." if absent else ""


@dataclass(frozen=True)
class ExitAccuracy:
    """One exit against the image's ground truth; shares in 0..1."""

    pixels: float
    """Share of the scored pixels with the right class."""
    miou: float
    """Mean IoU over the classes that are in the truth or in the segmentation."""


@dataclass(frozen=True)
class RunView:
    """One run's exits on one photo."""

    subject: Subject
    exits: tuple[ExitView, ...]
    accuracy: tuple[ExitAccuracy | None, ...]
    """Per exit; None without labels, and where the exit has no segmentation."""


@dataclass(frozen=True)
class PhotoView:
    """One photo as all the runs see it."""

    path: Path
    size: tuple[int, int]
    """(height, width) of the photo itself."""
    photo: Pixels
    """[H, W, 3], at the size shown."""
    truth: Pixels | None
    """Labels [H, W], at the size shown; None without --labels."""
    runs: tuple[RunView, ...]
    """Before and after, or the one run."""
    classes: tuple[int, ...]
    """Ids of the classes whose scores are shown, in order; the same for all exits."""
    present: frozenset[int]
    """Ids of the classes in the truth, or without it in the last run's own segmentation."""


def load_subjects(folder: Path, before: Path | None, device: str) -> tuple[Subject, ...]:
    """The run in `folder`, with that in `before` ahead of it where there is one.

    A baseline is looked at where the run beside it has its taps, if they are the same network.
    Raises UserError where a run can't be read, or the two have different classes.
    """
    run = open_run(folder)
    if before is None:
        return (_load(run, None, device),)
    earlier = open_run(before)
    if earlier.spec.classes != run.spec.classes:
        raise UserError(
            f"{before} and {folder} have different classes ({_first_difference(earlier, run)}): "
            "compare runs of one data set"
        )
    same = earlier.network == run.network
    pairs = ((earlier, run), (run, earlier))
    return tuple(_load(one, other if same else None, device) for one, other in pairs)


def _first_difference(a: Run, b: Run) -> str:
    if a.spec.class_count != b.spec.class_count:
        return f"{a.spec.class_count} and {b.spec.class_count}"
    pairs = zip(a.spec.classes, b.spec.classes, strict=True)
    return next(f"'{one}' and '{other}'" for one, other in pairs if one != other)


def _load(run: Run, taps_of: Run | None, device: str) -> Subject:
    place = find_device(device)
    network = load_trained(run)
    if run.exits is not None:
        regulated = attach_exits(run, network)
    else:
        settings = regulation_of(taps_of or run).model_copy(update={"enabled": True})
        regulated = SelfRegulation(
            network,
            run.spec.class_count,
            settings=settings,
            probe_size=run.spec.input.near(PROBE_SIZE),
        ).eval()
    return Subject(run, regulated.to(place), trained=run.exits is not None)


def view_photos(
    subjects: Sequence[Subject], photos: Sequence[Path], labels: Path | None
) -> tuple[PhotoView, ...]:
    """What the subjects see in each photo. Raises UserError naming the photo or mask at fault."""
    masks = [None if labels is None else _mask_of(photo, photos, labels) for photo in photos]
    pairs = list(zip(photos, masks, strict=True))
    return tuple(
        _view_photo(subjects, photo, mask)
        for photo, mask in track(pairs, "looking", total=len(pairs))
    )


def _mask_of(photo: Path, photos: Sequence[Path], labels: Path) -> Path:
    if labels.is_dir():
        return labels / f"{photo.stem}.png"
    if len(photos) > 1:
        raise UserError(
            f"--labels {labels} is one mask for {len(photos)} photos: give the folder of the masks"
        )
    return labels


def _view_photo(subjects: Sequence[Subject], path: Path, mask: Path | None) -> PhotoView:
    photo = read_photo(path)
    size = (photo.shape[0], photo.shape[1])
    truth = None if mask is None else _read_truth(mask, path, size)
    runs = []
    for subject in subjects:
        spec = subject.run.spec
        try:
            image = fit(photo, spec)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        exits = view_exits(subject.regulated, image, spec, subject.trained)
        accuracy = tuple(_accuracy(exit, truth, size, spec, mask) for exit in exits)
        runs.append(RunView(subject, exits, accuracy))
    shown = shown_size(size)
    own = runs[-1].exits[-1].labels
    assert own is not None  # the network's own output always has a segmentation
    present = _classes_in(own if truth is None else truth, subjects[-1].run.spec)
    return PhotoView(
        path=path,
        size=size,
        photo=np.asarray(Image.fromarray(photo).resize(shown[::-1], Image.Resampling.LANCZOS)),
        truth=None if truth is None else restore(truth, *shown),
        runs=tuple(runs),
        classes=_likeliest(runs, present),
        present=present,
    )


def _read_truth(mask: Path, photo: Path, size: tuple[int, int]) -> Pixels:
    truth = read_labels(mask)
    if truth.shape != size:
        raise UserError(
            f"{mask} is {truth.shape[1]}x{truth.shape[0]}, but {photo} is {size[1]}x{size[0]} "
            "(width x height): the mask must have its photo's size"
        )
    return truth


def _accuracy(
    exit: ExitView, truth: Pixels | None, size: tuple[int, int], spec: Spec, mask: Path | None
) -> ExitAccuracy | None:
    if truth is None or exit.labels is None:
        return None
    score = Score(spec)
    try:
        score.update(truth, restore(exit.labels, *size))
        result = score.result()
    except UserError as error:
        raise UserError(f"{mask}: {error}") from error
    return ExitAccuracy(result.pixel_accuracy, result.miou)


def _classes_in(labels: Pixels, spec: Spec) -> frozenset[int]:
    counts = np.bincount(labels.ravel(), minlength=256)[: spec.class_count]
    return frozenset(np.flatnonzero(counts >= max(1, PRESENT * labels.size)).tolist())


def _likeliest(runs: Sequence[RunView], present: frozenset[int]) -> tuple[int, ...]:
    """Up to TOP classes: those with the highest score of any exit; of equal ones those present."""
    scores = [exit.presence for run in runs for exit in run.exits if exit.presence is not None]
    if not scores:
        return ()
    best = np.asarray(scores).max(axis=0)
    order = sorted(range(len(best)), key=lambda i: (-round(float(best[i]), 3), i not in present, i))
    return tuple(sorted(order[:TOP]))


def shown_size(size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the pictures of a photo of `size`."""
    return scaled_size(*size, SHOWN) if max(size) > SHOWN else size


def summary(view: PhotoView) -> dict[str, Any]:
    """The figures of one photo, for --json; all shares in 0..1."""
    return {
        "photo": str(view.path),
        "size": list(view.size),
        "present": sorted(view.present),
        "runs": [
            {
                "run": str(one.subject.run.folder),
                "exits_trained": one.subject.trained,
                "exits": list(_exit_figures(one)),
            }
            for one in view.runs
        ],
    }


def exits_table(view: PhotoView) -> "Table":
    """The figures of one photo for people: one row per exit of each run."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(str(view.path)), title_justify="left")
    for column in ("run", "exit", "likeliest classes"):
        table.add_column(column, overflow="fold")
    columns = ["as the output %"]
    if view.truth is not None:
        columns += ["right %", "mIoU %"]
    for column in columns:
        table.add_column(column, justify="right")
    for run in view.runs:
        for figures in _exit_figures(run):
            scores = list((figures["class_scores"] or {}).items())[:3]
            row = [
                run.subject.run.folder.name,
                figures["name"],
                ", ".join(f"{name} {score:.2f}" for name, score in scores) or "-",
                percent(figures["agreement"]),
            ]
            if view.truth is not None:
                row += [percent(figures["pixel_accuracy"]), percent(figures["miou"])]
            table.add_row(*(Text(word) for word in row))
        table.add_section()
    return table


def _exit_figures(run: RunView) -> Iterator[dict[str, Any]]:
    names = run.subject.run.spec.classes
    for exit, accuracy in zip(run.exits, run.accuracy, strict=True):
        scores = exit.presence or ()
        top = sorted(range(len(scores)), key=lambda i: -scores[i])[:TOP]
        yield {
            "name": exit.name,
            "role": exit.role,
            "channels": exit.channels,
            "stride": exit.stride,
            "grid": list(exit.grid),
            "agreement": exit.agreement,
            "class_scores": {names[i]: scores[i] for i in top} or None,
            "pixel_accuracy": None if accuracy is None else accuracy.pixels,
            "miou": None if accuracy is None else accuracy.miou,
        }
