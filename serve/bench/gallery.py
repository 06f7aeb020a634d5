"""The photos on which artifacts differ most: photo, truth, every mask, and where they differ."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from srdeploy.imaging import Pixels, colour_table
from srdeploy.metrics import percent
from srdeploy.serve.report import Picture, Section, drawing, photo
from srdeploy.spec import Spec

if TYPE_CHECKING:
    from srdeploy.serve.bench.accuracy import DifferingPhoto

MARK = np.array([230, 0, 126], np.uint8)
"""RGB of a pixel with two labels; no palette in common use has it beside gray."""
LONGEST = 640
"""Pixels; larger pictures are thinned for the page."""


def gallery(photos: Sequence["DifferingPhoto"], names: Sequence[str], spec: Spec) -> Section:
    """One row per photo; `names` are the artifacts' whose masks the photos carry, two or more.

    Below each mask stands its pixel accuracy on that photo.
    """
    first, second = names[:2]
    return Section(
        f"Where {second} and {first} differ most",
        text=(
            f"Photos by the share of pixels to which {second} gives another class than {first}; "
            "those pixels are marked in the last picture. Below each mask: its pixel accuracy."
        ),
        gallery_header=["photo", "truth", *names, "differing pixels"],
        gallery=[_row(one, spec) for one in photos],
        legend=[
            *(
                (name, f"rgb({red}, {green}, {blue})")
                for name, (red, green, blue) in zip(spec.classes, spec.palette, strict=True)
            ),
            ("differs", f"rgb({MARK[0]}, {MARK[1]}, {MARK[2]})"),
        ],
    )


def _row(one: "DifferingPhoto", spec: Spec) -> list[Picture]:
    table = colour_table(spec)
    step = -(-max(one.truth.shape) // LONGEST)
    thin = slice(None, None, step)
    masks = [
        drawing(table[mask[thin, thin]], f"{percent(_accuracy(mask, one.truth, spec))} %")
        for mask in one.masks
    ]
    marked = mark(one.photo, one.masks[0] != one.masks[1], step)
    return [
        photo(one.photo[thin, thin], one.name),
        drawing(table[one.truth[thin, thin]], "as drawn"),
        *masks,
        drawing(marked, f"{percent(one.differs)} % of pixels"),
    ]


def _accuracy(mask: Pixels, truth: Pixels, spec: Spec) -> float | None:
    valid = truth != spec.ignore_index
    return float((mask[valid] == truth[valid]).mean()) if valid.any() else None


def mark(image: Pixels, differs: npt.NDArray[np.bool_], step: int) -> Pixels:
    """The photo in pale gray, uint8 [h, w, 3], with a mark wherever one of the pixels that a shown
    one stands for differs: none is lost by thinning."""
    gray = image[::step, ::step].mean(axis=2, keepdims=True)
    pale = np.repeat((255 - (255 - gray) * 0.5).astype(np.uint8), 3, axis=2)
    rows = np.maximum.reduceat(differs, np.arange(0, differs.shape[0], step), axis=0)
    pale[np.maximum.reduceat(rows, np.arange(0, differs.shape[1], step), axis=1)] = MARK
    return pale
