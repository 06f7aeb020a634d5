"""An inspection as one self-contained HTML page: light and dark, phone and desk, no external
resources."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from srdeploy.cli.inspection import PRESENT, PhotoView, RunView
from srdeploy.cli.inspection_pictures import (
    COLOURS,
    heading,
    heat_line,
    heat_picture,
    mask_lines,
    mask_picture,
    run_titles,
    shape_line,
)
from srdeploy.environment import describe_environment
from srdeploy.files import write_whole
from srdeploy.imaging import Pixels
from srdeploy.serve.report import drawing, photo, render_page
from srdeploy.spec import Spec

COLUMN_REM = 12
"""Width of a column in rem: six of them, and the rows' names, fit on a screen of 1280 pixels."""
READING = (
    "Each column is an exit, from the shallowest on. An exit reads the feature map of one stage of "
    "the network, segments the image from it and says which classes are in the image. Exits exist "
    "in training alone; the last column is the network that is deployed.",
    "Maps: of an exit, how far each cell's features lie from the image's mean features (Euclidean "
    "distance over the channels); each map has its own scale from the 2nd to the 98th percentile, "
    "so that maps tell where something stands out, and not how much more than elsewhere. Of an "
    "output, the probability of the class that wins, from 0 to 1. Each pixel shows the cell under "
    "it: coarse maps look coarse.",
)


@dataclass(frozen=True)
class Cell:
    """A picture; `source` is a data URI."""

    source: str
    alt: str
    caption: str
    height: int
    cells: bool = False
    """Enlarged without smoothing."""


@dataclass(frozen=True)
class Bar:
    """One class's score of one exit."""

    name: str
    percent: str
    figure: str
    colour: str
    present: bool


@dataclass(frozen=True)
class Column:
    """One exit."""

    heading: str
    name: str
    shape: str
    heat: Cell
    mask: Cell | None
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Block:
    """One run on one photo."""

    title: str
    note: str
    photo: Cell
    truth: Cell | None
    columns: tuple[Column, ...]
    has_scores: bool


@dataclass(frozen=True)
class PhotoSection:
    """One photo and the runs on it."""

    name: str
    size: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    """What the template shows."""

    title: str
    lead: str
    photos: tuple[PhotoSection, ...]
    legend: tuple[tuple[str, str], ...]
    presence_note: str
    reading: tuple[str, ...]
    scale: tuple[str, ...]
    command: str
    environment: dict[str, str]
    width: int = 320
    """Nominal width of a picture, which its height goes with: the page keeps its place for it."""
    column_rem: int = COLUMN_REM


def write_page(views: Sequence[PhotoView], path: Path, command: str, blend: float) -> None:
    """Writes the page to `path` in one step. Raises UserError where that fails."""
    page = inspection_page(views, command, blend)
    write_whole(path, render_page("srdeploy.cli", "inspection.html", page=page))


def inspection_page(views: Sequence[PhotoView], command: str, blend: float) -> Page:
    """The page as data."""
    import matplotlib

    spec = views[0].runs[-1].subject.run.spec
    runs = run_titles(views[0])
    ends = matplotlib.colormaps[COLOURS](np.linspace(0, 1, 9), bytes=True)
    return Page(
        title="What each exit sees",
        lead=" · ".join([*runs, _photos(views)]),
        photos=tuple(_section(view, blend) for view in views),
        legend=tuple((name, _css(spec, index)) for index, name in enumerate(spec.classes)),
        presence_note=presence_note(views[0]),
        reading=READING,
        scale=tuple(f"rgb({r}, {g}, {b})" for r, g, b, _ in np.asarray(ends).tolist()),
        command=command,
        environment=describe_environment(("torch", "numpy", "pillow", "matplotlib")),
    )


def presence_note(view: PhotoView) -> str:
    """What the class scores are, and which names are bold."""
    source = "the network's output" if view.truth is None else "the ground truth"
    return (
        "The probability, by the exit's classifier, that the class is somewhere in the image. "
        f"Bold: in {source} on at least {100 * PRESENT:g} % of the pixels."
    )


def _photos(views: Sequence[PhotoView]) -> str:
    return views[0].path.name if len(views) == 1 else f"{len(views)} photos"


def _section(view: PhotoView, blend: float) -> PhotoSection:
    height, width = view.size
    titles = run_titles(view)
    return PhotoSection(
        name=view.path.name,
        size=f"{width}x{height}",
        blocks=tuple(
            _block(view, run, title, blend) for run, title in zip(view.runs, titles, strict=True)
        ),
    )


def _block(view: PhotoView, run: RunView, title: str, blend: float) -> Block:
    spec = run.subject.run.spec
    name = view.path.name
    truth = None
    if view.truth is not None:
        painted = mask_picture(view.truth, view.photo, spec)
        truth = _photograph(painted, f"{name}: ground truth", "ground truth")
    return Block(
        title=title,
        note=run.subject.note,
        photo=_photograph(view.photo, name, ""),
        truth=truth,
        columns=tuple(_columns(view, run, title, blend)),
        has_scores=any(exit.presence is not None for exit in run.exits),
    )


def _columns(view: PhotoView, run: RunView, title: str, blend: float) -> Iterator[Column]:
    spec = run.subject.run.spec
    for index, (exit, accuracy) in enumerate(zip(run.exits, run.accuracy, strict=True)):
        head = heading(index, exit)
        about = f"{view.path.name}, {title}, {head}"
        heat = heat_picture(exit, view.photo, blend)
        source = (drawing if blend == 0 else photo)(heat, "").source
        mask = None
        if exit.labels is not None:
            painted = mask_picture(exit.labels, view.photo, spec)
            figures = "; ".join(mask_lines(exit, accuracy))
            mask = _photograph(painted, f"{about}: segmentation. {figures}".strip(), figures)
        yield Column(
            heading=head,
            name=exit.name if exit.role != "output" else "deployed",
            shape=shape_line(exit),
            heat=Cell(
                source,
                f"{about}: {heat_line(exit)}",
                heat_line(exit),
                _height(heat),
                cells=blend == 0,
            ),
            mask=mask,
            bars=tuple(_bars(view, exit.presence, spec)),
        )


def _bars(view: PhotoView, presence: tuple[float, ...] | None, spec: Spec) -> Iterator[Bar]:
    if presence is None:
        return
    for index in view.classes:
        score = presence[index]
        yield Bar(
            name=spec.classes[index],
            percent=f"{100 * score:.1f}",
            figure=f"{score:.2f}",
            colour=_css(spec, index),
            present=index in view.present,
        )


def _photograph(image: Pixels, alt: str, caption: str) -> Cell:
    return Cell(photo(image, "").source, alt, caption, _height(image))


def _height(image: Pixels) -> int:
    height: int = round(Page.width * image.shape[0] / image.shape[1])
    return max(1, height)


def _css(spec: Spec, index: int) -> str:
    red, green, blue = spec.palette[index]
    return f"rgb({red}, {green}, {blue})"
