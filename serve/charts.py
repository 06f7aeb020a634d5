"""Charts as self-contained SVG text: readable on light and dark pages, and in print. Source of
data: the caller."""

from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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


def curves(series: Series, x: str, y: str) -> str:
    """Lines, one per name: (x values, y values). Returns SVG text."""

    def draw(axes: Axes) -> None:
        for (name, (xs, ys)), colour in zip(series.items(), COLOURS, strict=False):
            axes.plot(xs, ys, label=name, color=colour, linewidth=1.8)
        axes.legend()

    return _render(draw, x, y)


def grouped_bars(
    groups: Sequence[str], values: Mapping[str, Sequence[float | None]], y: str
) -> str:
    """One bar per group and name; None leaves a gap. Returns SVG text."""

    def draw(axes: Axes) -> None:
        places = np.arange(len(groups), dtype=np.float64)
        width = 0.8 / max(1, len(values))
        for index, (name, heights) in enumerate(values.items()):
            offset = (index - (len(values) - 1) / 2) * width
            tops = [np.nan if height is None else height for height in heights]
            axes.bar(places + offset, tops, width, label=name, color=COLOURS[index % len(COLOURS)])
        axes.set_xticks(places, groups, rotation=30, ha="right")
        axes.grid(axis="x", visible=False)
        axes.legend()

    return _render(draw, "", y)


def distributions(samples: Mapping[str, npt.NDArray[np.float64]], x: str) -> str:
    """Empirical distribution functions, one per name: the share of runs at or below a value. SVG
    text."""

    def draw(axes: Axes) -> None:
        for (name, values), colour in zip(samples.items(), COLOURS, strict=False):
            axes.ecdf(values, label=name, color=colour, linewidth=1.8)
        # The slowest few runs of a shared machine would squeeze everything else to the left.
        everything = np.concatenate(list(samples.values()))
        axes.set_xlim(float(everything.min()) * 0.98, float(np.quantile(everything, 0.99)) * 1.02)
        axes.legend(loc="lower right")

    return _render(draw, x, "share of runs")


def levels(values: Sequence[float | None], marked: tuple[int, str] | None, x: str, y: str) -> str:
    """One point per value on a logarithmic scale, in order. 0 is left out; None (no finite value)
    stands as a cross at the top. marked: the position and name of one that matters. Returns SVG
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


def _render(draw: Callable[[Axes], None], x: str, y: str) -> str:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        text = StringIO()
        figure.savefig(
            text, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    return text.getvalue()
