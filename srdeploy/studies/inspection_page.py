"""The cells of an inspection, as pictures and words; page and figure lay them out."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path, PurePath

import numpy as np
from PIL import Image

from srdeploy.environment import describe_environment
from srdeploy.imaging import Pixels, overlay, restore
from srdeploy.pages.report import (
    Bar,
    Bars,
    Block,
    Gallery,
    Legend,
    Picture,
    Report,
    Section,
    Text,
    class_legend,
    css,
    drawing,
    photo,
    write_report,
)
from srdeploy.spec import Spec
from srdeploy.studies.inspection import PRESENT, ExitAccuracy, PhotoView, RunView
from srdeploy.train.pictures import ExitView

COLOURS = "magma"
"""Of the heat maps: perceptually uniform and readable without colour vision, unlike jet."""
OPACITY = 0.6
"""Of the class colours over the photo."""


@cache
def _heat_table() -> Pixels:
    """uint8 [256, 3]: the colour of every heat, 0 first."""
    import matplotlib

    colours = matplotlib.colormaps[COLOURS](np.arange(256), bytes=True)
    table: Pixels = np.asarray(colours, np.uint8)[:, :3]
    return table


def heat_picture(exit: ExitView, photo: Pixels, blend: float) -> Pixels:
    """The exit's map over the photo's size, uint8 [H, W, 3]; `blend` is the photo's share, 0..1.

    A pixel shows the cell under its centre, so that the map's own resolution is seen as it is.
    """
    rows, columns = (
        (2 * np.arange(photo.shape[axis]) + 1)
        * (exit.size[axis] * exit.grid[axis])
        // (2 * photo.shape[axis] * exit.covered[axis])
        for axis in (0, 1)
    )
    cells = np.round(exit.heat * 255).astype(np.uint8)
    colours: Pixels = _heat_table()[cells.take(rows, axis=0).take(columns, axis=1)]
    if blend == 0:
        return colours
    gray = np.asarray(Image.fromarray(photo).convert("L"), np.float32)[..., None]
    mixed: Pixels = np.round(colours * (1 - blend) + gray * blend).astype(np.uint8)
    return mixed


def mask_picture(labels: Pixels, photo: Pixels, spec: Spec) -> Pixels:
    """The class colours over the photo, uint8 [H, W, 3]; labels uint8 [h, w] of any size."""
    return overlay(photo, restore(labels, photo.shape[0], photo.shape[1]), spec, OPACITY)


def heading(index: int, exit: ExitView) -> str:
    """What a column is called: exits are counted from the shallowest, 0."""
    if exit.role == "tap":
        return f"exit {index + 1}"
    return "network's output" if exit.role == "output" else "network's own head"


def shape_line(exit: ExitView) -> str:
    """Channels, cells and stride of the map, for the line below a heading."""
    height, width = exit.grid
    if exit.role != "tap":
        return f"{exit.channels} classes, {width}x{height} cells"
    return f"{exit.channels} channels, stride {exit.stride}, {width}x{height} cells"


def heat_line(exit: ExitView) -> str:
    """What the heat map shows."""
    return "contrast of the features" if exit.role == "tap" else "confidence"


def mask_lines(exit: ExitView, accuracy: ExitAccuracy | None) -> list[str]:
    """The figures below a segmentation; none for the output without ground truth."""
    lines = []
    if accuracy is not None:
        lines.append(f"{_percent(accuracy.pixels)} right, mIoU {_percent(accuracy.miou)}")
    if exit.role != "output" and exit.agreement is not None:
        lines.append(f"{_percent(exit.agreement)} as the network's output")
    return lines


def run_titles(view: PhotoView) -> list[str]:
    """One title per run: its name, with before and after where there are two."""
    names = [run_name(run) for run in view.runs]
    return names if len(names) == 1 else [f"Before: {names[0]}", f"After: {names[1]}"]


def run_name(run: RunView) -> str:
    """The run's folder and network."""
    found = run.subject.run
    return f"{PurePath(found.folder.resolve()).name} ({found.network.name})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


# The page.

COLUMN_REM = 10.5
"""Least width of a column in rem: seven fit on a screen of 1280 pixels."""
READING = (
    "Each column is an exit, from the shallowest on. An exit reads the feature map of one stage of "
    "the network, segments the image from it and says which classes are in the image. Exits exist "
    "only in training; the last column is the network that is deployed.",
    "Maps: of an exit, how far each cell's features lie from the image's mean features (Euclidean "
    "distance over the channels); each map has its own scale from the 2nd to the 98th percentile, "
    "so that maps tell where something stands out, and not how much more than elsewhere. Of an "
    "output, the probability of the class that wins, from 0 to 1. Each pixel shows the cell under "
    "it: coarse maps look coarse.",
)


def write_page(views: Sequence[PhotoView], path: Path, command: str, blend: float) -> None:
    """Writes the page to `path` in one step. Raises UserError where that fails."""
    write_report(inspection_page(views, command, blend), path)


def inspection_page(views: Sequence[PhotoView], command: str, blend: float) -> Report:
    """The page as data."""
    photos = views[0].path.name if len(views) == 1 else f"{len(views)} photos"
    sections = [_section(view, blend, first=view is views[0]) for view in views]
    reading = Section("How to read it", blocks=[_heat_legend(), *map(Text, READING)])
    return Report(
        title="What each exit sees",
        lead=" · ".join([*run_titles(views[0]), photos]),
        verdicts=(),
        sections=[*sections, reading],
        command=command,
        environment=describe_environment(("torch", "numpy", "pillow", "matplotlib")),
        wide=True,
    )


def presence_note(view: PhotoView) -> str:
    """What the class scores are, and which names are bold."""
    source = "the network's output" if view.truth is None else "the ground truth"
    return (
        "The probability, by the exit's classifier, that the class is somewhere in the image. "
        f"Bold: in {source} on at least {100 * PRESENT:g} % of the pixels."
    )


def _heat_legend() -> Legend:
    """The colours of the maps as a gradient."""
    ends = ", ".join(css((r, g, b)) for r, g, b in _heat_table()[::51].tolist())
    return Legend([("colours of the maps: least to most", f"linear-gradient(to right, {ends})")])


def _section(view: PhotoView, blend: float, first: bool) -> Section:
    height, width = view.size
    blocks: list[Block] = [class_legend(view.runs[-1].subject.run.spec)] if first else []
    for run, title in zip(view.runs, run_titles(view), strict=True):
        blocks.append(_exits(view, run, title, blend))
    return Section(view.path.name, f"{width}x{height}", blocks)


def _exits(view: PhotoView, run: RunView, title: str, blend: float) -> Gallery:
    """One run on one photo: a column per exit; rows of maps, segmentations and class scores."""
    spec, name = run.subject.run.spec, view.path.name
    truth = None
    if view.truth is not None:
        painted = mask_picture(view.truth, view.photo, spec)
        truth = photo(painted, "ground truth", f"{name}: ground truth")
    header = ["photo"]
    maps: list[Picture | Bars | Text | None] = [photo(view.photo, "", name)]
    masks: list[Picture | Bars | Text | None] = [truth]
    scores: list[Picture | Bars | Text | None] = [Text(presence_note(view), soft=True)]
    for index, (exit, accuracy) in enumerate(zip(run.exits, run.accuracy, strict=True)):
        about = f"{name}, {title}, {heading(index, exit)}"
        called = exit.name if exit.role != "output" else "deployed"
        header.append(f"{heading(index, exit)}\n{called}\n{shape_line(exit)}")
        picture = drawing if blend == 0 else photo
        shown = heat_line(exit)
        maps.append(picture(heat_picture(exit, view.photo, blend), shown, f"{about}: {shown}"))
        if exit.labels is None:
            masks.append(Text("no segmenter was trained here", soft=True))
        else:
            painted = mask_picture(exit.labels, view.photo, spec)
            figures = "; ".join(mask_lines(exit, accuracy))
            masks.append(photo(painted, figures, f"{about}: segmentation. {figures}".strip()))
        if exit.presence is None:
            scores.append(Text("no classifier here", soft=True))
        else:
            scores.append(_scores(view, exit.presence, spec))
    rows, titles = [maps, masks], ["maps", "segmentation"]
    if any(exit.presence is not None for exit in run.exits):
        rows.append(scores)
        titles.append("classes")
    return Gallery(header, rows, titles, title, run.subject.note, COLUMN_REM)


def _scores(view: PhotoView, presence: Sequence[float], spec: Spec) -> Bars:
    return Bars(
        [
            Bar(
                spec.classes[index],
                f"{presence[index]:.2f}",
                [("score", 100 * presence[index], css(spec.palette[index]))],
                strong=index in view.present,
            )
            for index in view.classes
        ]
    )
