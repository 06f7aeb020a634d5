"""Whether two label maps are the same."""

from typing import Literal

import numpy as np

from srdeploy.imaging import Pixels

ROUNDING = 1e-3
"""Share of a mask's pixels that may have another label: another batch size or number of threads
adds in another order, which turns pixels where two classes are as good as equal."""


def compare_labels(labels: Pixels, wanted: Pixels) -> Literal["same", "rounded", "wrong"]:
    """rounded: they differ in no more than ROUNDING of the pixels. Both uint8 [H, W]."""
    if labels.shape != wanted.shape:
        return "wrong"
    share = np.count_nonzero(labels != wanted) / wanted.size
    if share == 0:
        return "same"
    return "rounded" if share <= ROUNDING else "wrong"
