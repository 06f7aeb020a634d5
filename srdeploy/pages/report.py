"""One self-contained HTML page: verdicts on top, then tables, charts and pictures. No external
resources."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from srdeploy.files import write_whole
from srdeploy.imaging import Pixels, encode_jpeg, encode_png


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


@dataclass(frozen=True)
class Table:
    """A small table; the first column names the row. A line break in a cell is kept."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    prose: bool = False
    """The last column is text: it wraps, and stands to the left."""
    links: Sequence[str] = ()
    """Anchors of sections, one for each row's name; none: no links."""


@dataclass(frozen=True)
class Picture:
    """An image with its caption; `source` is a data URI."""

    source: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph, then tables, charts and rows of pictures."""

    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    charts: Sequence[Picture] = ()
    gallery_header: Sequence[str] = ()
    gallery: Sequence[Sequence[Picture]] = ()
    legend: Sequence[tuple[str, str]] = ()
    """(class name, CSS colour) of the masks shown."""
    key: Sequence[tuple[str, str]] = ()
    """(name, CSS colour) of what the charts draw; none where they carry legends themselves."""
    anchor: str = ""
    """What links on the page call the section."""


@dataclass(frozen=True)
class Report:
    """Everything on the page, in its order."""

    title: str
    lead: str
    verdicts: Sequence[Verdict]
    sections: Sequence[Section]
    command: str
    environment: dict[str, str] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    """What weakens the figures, in sentences; shown before the verdicts."""


def chart(svg: str, caption: str) -> Picture:
    """SVG text as a picture."""
    return Picture("data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode(), caption)


def photo(image: Pixels, caption: str) -> Picture:
    """RGB uint8 [H, W, 3] as a JPEG picture."""
    return Picture(
        "data:image/jpeg;base64," + base64.b64encode(encode_jpeg(image)).decode(), caption
    )


def drawing(image: Pixels, caption: str) -> Picture:
    """RGB uint8 [H, W, 3] with flat colours as a PNG picture."""
    return Picture("data:image/png;base64," + base64.b64encode(encode_png(image)).decode(), caption)


def render(report: Report) -> str:
    """The page as HTML text."""
    return render_page("srdeploy.pages", "report.html", report=report)


def render_page(package: str, template: str, **values: Any) -> str:
    """HTML text of a Jinja template that lies in `package`; `{{ house }}` is the pages' shared CSS.

    Values are escaped; one that the template names but that is not given is an error.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    text = package_files(package).joinpath(template).read_text("utf-8")
    house = Markup(package_files("srdeploy.pages").joinpath("house.css").read_text("utf-8"))
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(text).render(house=house, **values)


def write_report(report: Report, path: Path) -> None:
    """Writes the page to `path` in one step. Raises UserError where that fails."""
    write_whole(path, render(report))
