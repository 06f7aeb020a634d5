"""Charts as self-contained SVG text: readable on light and dark pages, and in print."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any, Literal

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

# Okabe and Ito's palette: told apart with every kind of colour vision. The order is kept across
# all charts of a page, so that an artifact has one colour.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
INK = "#7a7f87"  # readable on white and on the dark page alike
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "srdeploy",  # equal charts are equal text
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#7a7f8733",
    "legend.frameon": False,
}

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
Floats = npt.NDArray[np.float64]
Colours = Mapping[str, str]
"""CSS colour by the name of what is drawn. Charts that take them carry no legend: the page has one
for all of them."""

COLUMN = (5.0, 3.1)
"""Size of a chart in inches: its letters stay readable on a phone."""
WIDE_RANGE = 3.0
"""Values that span more than this factor are drawn on a logarithmic axis."""


@dataclass(frozen=True)
class Ratios:
    """One artifact's latencies over another's."""

    rounds: Sequence[float]
    """One per round, in the order measured; what the interval is about."""
    interval: tuple[float, float, float]
    """Value, low, high."""
    floor: tuple[float, float, float]
    """Value, low, high of one artifact against itself."""
    floor_rounds: Sequence[float]
    """The same by round."""
    margin: float | None
    """Ratios in 1 / (1 + margin) .. 1 + margin are as good as 1; None: nothing was asked."""
    colour: str


def curves(series: Series, x: str, y: str) -> str:
    """Lines, one per name: (x values, y values). Returns SVG text."""

    def draw(axes: Axes) -> None:
        for (name, (xs, ys)), colour in zip(series.items(), COLOURS, strict=False):
            axes.plot(xs, ys, label=name, color=colour, linewidth=1.8)
        axes.legend()

    return _render(draw, x, y)


def distributions(samples: Mapping[str, Floats], x: str, colours: Colours) -> str:
    """Empirical distribution functions, one per name: the share of runs at or below a value. The
    axis ends at the 99 % quantile of all. SVG text."""

    def draw(axes: Axes) -> None:
        for name, values in samples.items():
            axes.ecdf(values, color=colours[name], linewidth=1.8)
        # The slowest few runs of a shared machine would squeeze everything else to the left.
        everything = np.concatenate(list(samples.values()))
        axes.set_xlim(float(everything.min()) * 0.98, float(np.quantile(everything, 0.99)) * 1.02)

    return _render(draw, x, "share of runs at or below")


def tails(samples: Mapping[str, Floats], x: str, colours: Colours) -> str:
    """The share of runs that are slower than a value, down to the slowest of all, on a logarithmic
    scale. SVG text."""

    def draw(axes: Axes) -> None:
        for name, values in samples.items():
            axes.ecdf(values, complementary=True, color=colours[name], linewidth=1.8)
            axes.plot(values.max(), 1 / len(values), "o", color=colours[name], markersize=4)
        everything = np.concatenate(list(samples.values()))
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(0.5 / max(len(values) for values in samples.values()), 1.3)
        _span(axes, "x", everything)

    return _render(draw, x, "share of runs slower than")


def over_time(rounds: Mapping[str, Sequence[Sequence[float]]], y: str, colours: Colours) -> str:
    """Every run in the order measured, one dot each; a round is one unit wide. SVG text."""

    def draw(axes: Axes) -> None:
        for name, runs in rounds.items():
            places = [
                i + (k + 0.5) / len(one) for i, one in enumerate(runs) for k in range(len(one))
            ]
            values = [value for one in runs for value in one]
            # As pixels: thousands of dots as text would be megabytes.
            axes.plot(places, values, ".", color=colours[name], markersize=3.5, rasterized=True)
        count = max(len(runs) for runs in rounds.values())
        axes.set_xlim(0, count)
        step = max(1, count // 10)
        ticks = np.arange(0, count, step)
        axes.set_xticks(ticks + 0.5, [str(tick + 1) for tick in ticks])
        axes.grid(axis="x", visible=False)
        for edge in range(1, count):
            axes.axvline(edge, color="#7a7f8333", linewidth=0.8)
        _span(axes, "y", np.array([v for runs in rounds.values() for one in runs for v in one]))

    return _render(draw, "round", y)


def ratios(found: Ratios, x: str) -> str:
    """Two lanes, an artifact's and below it the noise floor's: one dot per round, the first at the
    bottom, and under them the interval. The margin is shaded. SVG text."""

    def draw(axes: Axes) -> None:
        if found.margin is not None:
            low, high = 1 / (1 + found.margin), 1 + found.margin
            axes.axvspan(low, high, color="#009e73", alpha=0.18, linewidth=0)
        axes.axvline(1.0, color=INK, linewidth=1)
        for lane, colour, rounds, (value, low, high) in (
            (1.0, found.colour, found.rounds, found.interval),
            (0.0, INK, found.floor_rounds, found.floor),
        ):
            heights = np.linspace(lane - 0.05, lane + 0.4, len(rounds))
            axes.plot(rounds, heights, "o", color=colour, markersize=3.5, alpha=0.6)
            place = lane - 0.28
            axes.plot((low, high), (place, place), color=colour, linewidth=2.5)
            axes.plot((low, high), (place, place), "|", color=colour, markersize=12)
            axes.plot(value, place, "D", color=colour, markersize=6)
        axes.set_yticks((0.0, 1.0), ("noise floor", "ratio"))
        axes.set_ylim(-0.5, 1.55)
        axes.margins(x=0.08)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.ticklabel_format(axis="x", useOffset=False)
        axes.grid(axis="y", visible=False)

    return _render(draw, x, "", (COLUMN[0], 2.7))


def bars(
    groups: Sequence[str],
    values: Mapping[str, Sequence[float | None]],
    x: str,
    colours: Colours,
) -> str:
    """Horizontal bars, one per group and name, first group on top; None leaves a gap. SVG text."""
    height = 0.8 / len(values)

    def draw(axes: Axes) -> None:
        places = np.arange(len(groups), dtype=np.float64)
        for index, (name, widths) in enumerate(values.items()):
            offset = (index - (len(values) - 1) / 2) * height
            known = [lane for lane, width in enumerate(widths) if width is not None]
            ends = [width for width in widths if width is not None]
            axes.barh(places[known] + offset, ends, height, color=colours[name])
        _lanes(axes, groups)

    return _render(draw, x, "", (COLUMN[0], 0.9 + len(groups) * (0.12 + 0.11 * len(values))))


def dots(
    groups: Sequence[str],
    values: Mapping[str, Sequence[float | None]],
    x: str,
    colours: Colours,
) -> str:
    """One line per group, first on top, and on it a dot per name; None leaves it out. SVG text."""

    def draw(axes: Axes) -> None:
        for index, (name, places) in enumerate(values.items()):
            shown = [(place, lane) for lane, place in enumerate(places) if place is not None]
            # Smaller ones lie on top, so that equal values are seen to be equal.
            size = max(4.0, 10.0 - 2.5 * index)
            axes.plot(*zip(*shown, strict=True), "o", color=colours[name], markersize=size)
        everything = [place for places in values.values() for place in places if place is not None]
        _span(axes, "x", np.array(everything))
        _lanes(axes, groups)

    return _render(draw, x, "", (COLUMN[0], 0.9 + 0.28 * len(groups)))


def levels(values: Sequence[float | None], marked: tuple[int, str] | None, x: str, y: str) -> str:
    """One point per value on a logarithmic scale, in order. 0 is left out; None (no finite value)
    is a cross at the top. marked: the position and name of one that matters. Returns SVG
    text."""

    def draw(axes: Axes) -> None:
        high = max((value for value in values if value), default=1.0)
        heights = np.array([high if value is None else value or np.nan for value in values])
        places = np.arange(len(values))
        lost = np.array([value is None for value in values], np.bool_)
        axes.set_yscale("log")
        axes.set_xlim(-1, len(values))
        axes.plot(places[~lost], heights[~lost], ".-", color=COLOURS[0], linewidth=1, markersize=5)
        axes.plot(places[lost], heights[lost], "x", color=COLOURS[4], label="NaN or infinity")
        if lost.any():
            axes.legend()
        if marked is not None:
            place, name = marked
            right = place > len(values) / 2
            axes.plot(place, heights[place], "o", color=COLOURS[4], markersize=8)
            axes.annotate(
                name,
                (place, heights[place]),
                xytext=(-9 if right else 9, 9),
                textcoords="offset points",
                ha="right" if right else "left",
                annotation_clip=False,
            )
            axes.margins(y=0.15)

    return _render(draw, x, y)


def plain(text: str) -> str:
    """Text that matplotlib draws as it is: between two dollar signs it would read a formula."""
    return text.replace("$", r"\$")


def _lanes(axes: Axes, groups: Sequence[str]) -> None:
    """Names the horizontal lanes 0, 1, ..., the first on top."""
    axes.set_yticks(range(len(groups)), [plain(group) for group in groups])
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)


def _span(axes: Axes, way: Literal["x", "y"], values: Floats) -> None:
    """A logarithmic axis with plain numbers where the values span much."""
    if values.min() <= 0 or values.max() <= WIDE_RANGE * values.min():
        return
    (axes.set_xscale if way == "x" else axes.set_yscale)("log")
    axis = axes.xaxis if way == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _render(
    draw: Callable[[Axes], None], x: str, y: str, size: tuple[float, float] = COLUMN
) -> str:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        text = StringIO()
        figure.savefig(
            text, format="svg", transparent=True, dpi=200, metadata={"Date": None, "Creator": None}
        )
    return text.getvalue()
