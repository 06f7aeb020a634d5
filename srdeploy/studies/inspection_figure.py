"""An inspection of one photo as a PNG: a column per exit; rows of maps, segmentations and class
scores."""

import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.patches import Patch

from srdeploy.files import write_whole
from srdeploy.imaging import Pixels
from srdeploy.spec import Spec
from srdeploy.studies.inspection import PhotoView, RunView
from srdeploy.studies.inspection_page import (
    heading,
    heat_line,
    heat_picture,
    mask_lines,
    mask_picture,
    run_titles,
    shape_line,
)
from srdeploy.train.pictures import ExitView

COLUMN = 2.35
"""Width of a column, inches."""
GAP = 0.12
"""Between columns, inches."""
TITLE = 0.36
"""Height of the line above a run's block, inches."""
HEAD = 0.52
"""Height above a row of maps, for the exits' names, inches."""
CAPTION = 0.36
"""Height below a row of pictures, inches."""
BAR = 0.13
"""Height of a class's bar, inches."""
NOTE = 0.2
"""Height of the line at the bottom that says how to read the figure, inches."""
DPI = 120
SOFT = "#5d6570"
# Names are shown as they are: '$' must not begin a formula.
STYLE: dict[Any, Any] = {"font.family": "sans-serif", "font.size": 8, "text.parse_math": False}


def write_figure(view: PhotoView, path: Path, blend: float) -> None:
    """Writes the figure to `path` in one step. Raises UserError where that fails."""
    write_whole(path, figure_png(view, blend))


def figure_png(view: PhotoView, blend: float) -> bytes:
    """The figure as a PNG."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # A name in a script that matplotlib's font lacks is drawn as boxes.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        figure = _draw(view, blend)
        buffer = BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def _draw(view: PhotoView, blend: float) -> Figure:
    columns = 1 + max(len(run.exits) for run in view.runs)
    width = columns * COLUMN + (columns + 1) * GAP
    picture = COLUMN * view.photo.shape[0] / view.photo.shape[1]
    scores = [_score_height(view, run) for run in view.runs]
    spec = view.runs[-1].subject.run.spec
    legend = _legend_height(spec, width)
    blocks = [TITLE + HEAD + 2 * (picture + CAPTION) + height for height in scores]
    height = sum(blocks) + legend + GAP
    figure = Figure(figsize=(width, height), facecolor="white")
    top = height
    titles = run_titles(view)
    for run, title, block, score in zip(view.runs, titles, blocks, scores, strict=True):
        place = f"{view.path.name} · {title}" if run is view.runs[0] else title
        figure.text(GAP / width, (top - 0.6 * TITLE) / height, place, size=11, weight="bold")
        if run.subject.note:
            figure.text(
                1 - GAP / width,
                (top - 0.6 * TITLE) / height,
                run.subject.note,
                color=SOFT,
                ha="right",
            )
        rows = GridSpec(
            3,
            columns,
            figure,
            left=GAP / width,
            right=1 - GAP / width,
            top=(top - TITLE - HEAD) / height,
            bottom=(top - block + CAPTION * 0.5) / height,
            wspace=GAP / COLUMN,
            hspace=CAPTION / ((2 * picture + score) / 3),
            height_ratios=[picture, picture, max(score, 1e-3)],
        )
        _draw_run(figure, rows, view, run, blend)
        top -= block
    _draw_legend(figure, spec, width, height)
    figure.text(GAP / width, 0.06 / height, _note(view), size=7, color=SOFT)
    return figure


def _note(view: PhotoView) -> str:
    """How to read the figure, in one line; without bars there is nothing to say of them."""
    maps = (
        "Maps: distance of each cell's features from their mean, every map on its own scale; of an "
        "output, the winning class's probability."
    )
    if not view.classes:
        return maps
    source = "the network's output" if view.truth is None else "the ground truth"
    return f"{maps} Bars: probability that the class is in the image; bold: in {source}."


def _draw_run(figure: Figure, rows: GridSpec, view: PhotoView, run: RunView, blend: float) -> None:
    spec = run.subject.run.spec
    first = figure.add_subplot(rows[0, 0])
    _show(first, view.photo, "")
    _name(first, "photo", f"{view.size[1]}x{view.size[0]}")
    if view.truth is not None:
        _show(
            figure.add_subplot(rows[1, 0]),
            mask_picture(view.truth, view.photo, spec),
            "ground truth",
        )
    labelled = False
    for index, (exit, accuracy) in enumerate(zip(run.exits, run.accuracy, strict=True)):
        axes = figure.add_subplot(rows[0, index + 1])
        _show(axes, heat_picture(exit, view.photo, blend), heat_line(exit))
        name = exit.name if exit.role != "output" else "deployed"
        _name(axes, f"{heading(index, exit)}: {_short(name)}", shape_line(exit))
        below = figure.add_subplot(rows[1, index + 1])
        if exit.labels is None:
            _say(below, "no segmenter\nwas trained here")
        else:
            caption = "\n".join(mask_lines(exit, accuracy))
            _show(below, mask_picture(exit.labels, view.photo, spec), caption)
        if exit.presence is not None:
            _bars(figure.add_subplot(rows[2, index + 1]), view, exit, spec, not labelled)
            labelled = True


def _show(axes: Axes, image: Pixels, caption: str) -> None:
    axes.imshow(image, aspect="auto", interpolation="antialiased")
    axes.set_axis_off()
    axes.text(0, -0.03, caption, transform=axes.transAxes, va="top", size=7, color=SOFT)


def _name(axes: Axes, heading: str, line: str) -> None:
    axes.text(0, 1.13, heading, transform=axes.transAxes, va="bottom", weight="bold")
    axes.text(0, 1.03, line, transform=axes.transAxes, va="bottom", size=7, color=SOFT)


def _say(axes: Axes, text: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=SOFT)


def _bars(axes: Axes, view: PhotoView, exit: ExitView, spec: Spec, names: bool) -> None:
    """The exit's class scores, the first class on top; classes in the image are bold."""
    assert exit.presence is not None
    places = range(len(view.classes))
    colours = [_colour(spec, i) for i in view.classes]
    scores = [exit.presence[i] for i in view.classes]
    axes.barh(places, scores, 0.8, color=colours, edgecolor=SOFT, linewidth=0.5)
    for place, score in zip(places, scores, strict=True):
        axes.text(1.02, place, f"{score:.2f}", va="center", size=6.5, color=SOFT)
    axes.set_xlim(0, 1.14)
    axes.set_ylim(len(view.classes) - 0.5, -0.5)
    axes.set_xticks([])
    axes.set_yticks(list(places) if names else [])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color(SOFT)
    axes.tick_params(length=0)
    if names:
        axes.set_yticklabels([_short(spec.classes[i]) for i in view.classes], size=7)
        for index, text in zip(view.classes, axes.get_yticklabels(), strict=True):
            text.set_fontweight("bold" if index in view.present else "normal")


def _score_height(view: PhotoView, run: RunView) -> float:
    shown = any(exit.presence is not None for exit in run.exits)
    return BAR * len(view.classes) if shown else 0.0


def _legend_columns(spec: Spec, width: float) -> int:
    return max(1, min(spec.class_count, int(width / 1.35)))


def _legend_height(spec: Spec, width: float) -> float:
    return 0.2 * -(-spec.class_count // _legend_columns(spec, width)) + 0.15 + NOTE


def _draw_legend(figure: Figure, spec: Spec, width: float, height: float) -> None:
    patches = [
        Patch(facecolor=_colour(spec, index), edgecolor=SOFT, lw=0.5, label=_short(name))
        for index, name in enumerate(spec.classes)
    ]
    figure.legend(
        handles=patches,
        loc="lower left",
        bbox_to_anchor=(GAP / width, NOTE / height),
        ncols=_legend_columns(spec, width),
        frameon=False,
        fontsize=7,
        borderaxespad=0.3,
        borderpad=0,
        handlelength=1.2,
        columnspacing=1.2,
    )


def _colour(spec: Spec, index: int) -> tuple[float, float, float]:
    red, green, blue = spec.palette[index]
    return red / 255, green / 255, blue / 255


def _short(name: str, limit: int = 26) -> str:
    """The name, or its end where it is long: modules differ at their ends."""
    return name if len(name) <= limit else f"…{name[1 - limit :]}"
