"""The cells of an inspection, as pictures and words; page and figure lay them out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath

import numpy as np
from PIL import Image

from srdeploy.environment import describe_environment
from srdeploy.files import write_whole
from srdeploy.imaging import Pixels, overlay, restore
from srdeploy.pages.report import drawing, photo, render_page
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


# An inspection as one self-contained HTML page: light and dark, phone and desk, no external
# resources.

COLUMN_REM = 12
"""Width of a column in rem: six of them, and the rows' names, fit on a screen of 1280 pixels."""
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


@dataclass(frozen=True)
class PictureCell:
    """A picture; `source` is a data URI."""

    source: str
    alt: str
    caption: str
    height: int
    cells: bool = False
    """Enlarged without smoothing."""


@dataclass(frozen=True)
class PresenceBar:
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
    heat: PictureCell
    mask: PictureCell | None
    bars: tuple[PresenceBar, ...]


@dataclass(frozen=True)
class Block:
    """One run on one photo."""

    title: str
    note: str
    photo: PictureCell
    truth: PictureCell | None
    columns: tuple[Column, ...]
    has_scores: bool


@dataclass(frozen=True)
class PhotoSection:
    """One photo and the runs on it."""

    name: str
    size: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class InspectionPage:
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
    write_whole(path, render_page("srdeploy.pages", "inspection.html", page=page))


def inspection_page(views: Sequence[PhotoView], command: str, blend: float) -> InspectionPage:
    """The page as data."""
    import matplotlib

    spec = views[0].runs[-1].subject.run.spec
    runs = run_titles(views[0])
    ends = matplotlib.colormaps[COLOURS](np.linspace(0, 1, 9), bytes=True)
    return InspectionPage(
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
            heat=PictureCell(
                source,
                f"{about}: {heat_line(exit)}",
                heat_line(exit),
                _height(heat),
                cells=blend == 0,
            ),
            mask=mask,
            bars=tuple(_bars(view, exit.presence, spec)),
        )


def _bars(view: PhotoView, presence: tuple[float, ...] | None, spec: Spec) -> Iterator[PresenceBar]:
    if presence is None:
        return
    for index in view.classes:
        score = presence[index]
        yield PresenceBar(
            name=spec.classes[index],
            percent=f"{100 * score:.1f}",
            figure=f"{score:.2f}",
            colour=_css(spec, index),
            present=index in view.present,
        )


def _photograph(image: Pixels, alt: str, caption: str) -> PictureCell:
    return PictureCell(photo(image, "").source, alt, caption, _height(image))


def _height(image: Pixels) -> int:
    height: int = round(InspectionPage.width * image.shape[0] / image.shape[1])
    return max(1, height)


def _css(spec: Spec, index: int) -> str:
    red, green, blue = spec.palette[index]
    return f"rgb({red}, {green}, {blue})"
