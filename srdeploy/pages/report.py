"""The contents of a page, as data, and the one self-contained HTML page that shows them.

A report has verdicts on top, then sections of blocks: tables, charts, galleries of pictures, bars,
legends, paragraphs and commands. The page loads nothing from elsewhere. `srdeploy.pages.text` shows
the same contents as Markdown and in the terminal.
"""

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any, ClassVar, ParamSpec

import numpy as np
import numpy.typing as npt

from srdeploy.files import write_whole
from srdeploy.imaging import Pixels, encode_jpeg, encode_png
from srdeploy.spec import Colour, Spec

P = ParamSpec("P")

DIFFERENT: Colour = (225, 0, 152)
"""Colour of pixels whose labels differ, on a pale photo; no common palette has it beside gray."""
_GRAY_STEP = 17
"""Between the levels of a pale photo: sixteen of them make small files."""


@dataclass(frozen=True)
class Verdict:
    """One line of the answer: did it hold, and the figure that says so."""

    claim: str
    figure: str
    passed: bool | None
    """None: a figure without a pass mark."""
    undecided: bool = False
    """A question that was asked and not answered; `passed` is None then."""
    detail: str = ""
    """A sentence below the claim."""

    @property
    def state(self) -> str:
        """passed, failed, undecided or figure: how the page marks it."""
        if self.passed is None:
            return "undecided" if self.undecided else "figure"
        return "passed" if self.passed else "failed"


# Blocks. `kind` names the macro of page.html that shows the block.


@dataclass(frozen=True)
class Text:
    """A paragraph; a soft one is a remark."""

    text: str
    soft: bool = False
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Code:
    """A command, as people type it."""

    text: str
    kind: ClassVar[str] = "code"


@dataclass(frozen=True)
class Table:
    """A small table; the first column names the row. Line breaks in cells are kept."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    prose: bool = False
    """The last column is text: it wraps and is aligned to the left."""
    links: Sequence[str] = ()
    """Anchors of sections, one per row, for the row's name; empty: no links."""
    note: str = ""
    """A remark below the table."""
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Legend:
    """What colours mean: (name, CSS background)."""

    entries: Sequence[tuple[str, str]]
    kind: ClassVar[str] = "legend"


@dataclass(frozen=True)
class Bar:
    """One class with its shares, and a figure at the end."""

    name: str
    figure: str
    shares: Sequence[tuple[str, float, str]]
    """(label, percent, CSS colour), one above the other."""
    colour: str = ""
    """CSS colour of a swatch before the name; empty: none."""
    strong: bool = False
    """Whether the name is bold."""


@dataclass(frozen=True)
class Bars:
    """Horizontal bars of 0..100 %."""

    bars: Sequence[Bar]
    kind: ClassVar[str] = "bars"


@dataclass(frozen=True)
class Picture:
    """An image with its caption; made by `photo` or `drawing`."""

    source: str
    """Data URI."""
    caption: str
    description: str = ""
    """Text below the enlarged picture and for screen readers; empty: the caption."""
    size: tuple[int, int] | None = None
    """(height, width), for which the page keeps a place."""
    pixelated: bool = False
    """Enlarged without smoothing."""
    kind: ClassVar[str] = "picture"


@dataclass(frozen=True)
class Chart:
    """SVG text with its caption; made by `chart` and drawn when a page is rendered."""

    draw: Callable[[], str]
    caption: str

    @cached_property
    def source(self) -> str:
        """Data URI."""
        return _data_uri("image/svg+xml", self.draw().encode())


@dataclass(frozen=True)
class Charts:
    """Charts side by side, as many as fit."""

    charts: Sequence[Chart]
    kind: ClassVar[str] = "charts"


@dataclass(frozen=True)
class Gallery:
    """A grid of pictures that open large, with a column for each name in `header`."""

    header: Sequence[str]
    """Lines after the first are set small."""
    rows: Sequence[Sequence[Picture | Bars | Text | None]]
    titles: Sequence[str] = ()
    """One per row, shown above it; empty: none."""
    title: str = ""
    """Heading of the grid."""
    remark: str = ""
    column_rem: float = 6.5
    """Least width of a column, rem."""
    kind: ClassVar[str] = "gallery"


Block = Text | Code | Table | Legend | Bars | Charts | Gallery


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph, then blocks."""

    title: str
    text: str = ""
    blocks: Sequence[Block] = ()
    anchor: str = ""
    """The id that links on the page use."""


@dataclass(frozen=True)
class Report:
    """Everything on the page, in its order."""

    title: str
    lead: str
    verdicts: Sequence[Verdict]
    sections: Sequence[Section]
    command: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    """What makes the figures unreliable, in sentences; shown before the verdicts."""
    wide: bool = False
    """Whether the page uses more of a wide screen than what is good to read."""


def chart(caption: str, draw: Callable[P, str], *args: P.args, **kwargs: P.kwargs) -> Chart:
    """The SVG text that `draw` returns for the arguments, drawn when a page needs it."""
    return Chart(partial(draw, *args, **kwargs), caption)


def photo(image: Pixels, caption: str, description: str = "") -> Picture:
    """RGB uint8 [H, W, 3] as a JPEG picture."""
    source = _data_uri("image/jpeg", encode_jpeg(image))
    return Picture(source, caption, description, (image.shape[0], image.shape[1]))


def drawing(image: Pixels, caption: str, description: str = "") -> Picture:
    """RGB uint8 [H, W, 3] with flat colours as a PNG picture."""
    source = _data_uri("image/png", encode_png(image))
    return Picture(source, caption, description, (image.shape[0], image.shape[1]), pixelated=True)


def mark_differences(image: Pixels, differs: npt.NDArray[np.bool_], step: int = 1) -> Pixels:
    """The photo [H, W, 3] in pale gray, with DIFFERENT wherever `differs` [H, W] is set.

    step: every `step`th row and column is shown, marked where any pixel that it stands for differs.
    """
    gray = image[::step, ::step].mean(2) / 2 + 110
    levels = (gray // _GRAY_STEP * _GRAY_STEP).astype(np.uint8)
    marked = np.repeat(levels[:, :, None], 3, axis=2)
    rows = np.maximum.reduceat(differs, np.arange(0, differs.shape[0], step), axis=0)
    marked[np.maximum.reduceat(rows, np.arange(0, differs.shape[1], step), axis=1)] = DIFFERENT
    return marked


def css(colour: Colour) -> str:
    """A colour as CSS has it."""
    return "rgb({}, {}, {})".format(*colour)


def class_legend(spec: Spec, *more: tuple[str, Colour]) -> Legend:
    """The colours of a spec's classes, and of what else masks show."""
    named = [*zip(spec.classes, spec.palette, strict=True), *more]
    return Legend([(name, css(colour)) for name, colour in named])


def write_report(report: Report, path: Path) -> None:
    """Writes the page to `path` in one step. Raises UserError where that fails."""
    write_whole(path, render(report))


def render(report: Report) -> str:
    """The page as HTML text."""
    return render_page("srdeploy.pages", "page.html", report=report)


def render_page(package: str, template: str, **values: Any) -> str:
    """HTML text of a Jinja template that lies in `package`; `{{ style }}` is the pages' shared CSS.

    Values are escaped; one that the template names but that is not given is an error.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    text = package_files(package).joinpath(template).read_text("utf-8")
    style = Markup(package_files("srdeploy.pages").joinpath("style.css").read_text("utf-8"))
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(text).render(style=style, **values)


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
