"""The cells of an inspection, as pictures and words; page and figure lay them out."""

from functools import cache
from pathlib import PurePath

import numpy as np
from PIL import Image

from srdeploy.cli.inspection import Accuracy, PhotoView, RunView
from srdeploy.imaging import Pixels, overlay, restore
from srdeploy.spec import Spec
from srdeploy.train.exit_views import ExitView

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


def mask_lines(exit: ExitView, accuracy: Accuracy | None) -> list[str]:
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
