"""Class weights for sets in which some classes have few pixels."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from srdeploy.console import track
from srdeploy.data import DataSet
from srdeploy.errors import UserError

Counts = npt.NDArray[np.int64]


def count_pixels(dataset: DataSet) -> tuple[Counts, Counts]:
    """(pixels per class, pixels of the photos in which the class occurs), both int64 [K].

    Ignored pixels count for neither.
    """
    classes = len(dataset.classes.names)
    pixels, present = np.zeros(classes, np.int64), np.zeros(classes, np.int64)
    for index in track(range(len(dataset)), "counting classes"):
        _, labels = dataset.read(index)
        counts = np.bincount(labels.ravel(), minlength=256)[:classes]
        pixels += counts
        present += (counts > 0) * counts.sum()
    return pixels, present


def median_frequency(pixels: Counts, present: Counts) -> npt.NDArray[np.float64]:
    """Weights float64 [K]: the median class frequency over each class's own (Eigen and Fergus, ICCV
    2015).

    A class's frequency is its share of the pixels of the photos in which it occurs. A class without
    pixels weighs 1 and takes no part in the median. Raises UserError where no class has a pixel.
    """
    found = pixels > 0
    if not found.any():
        raise UserError("class weights: no pixel of the training split carries a class")
    frequency = pixels[found] / present[found]
    weights = np.ones(len(pixels), np.float64)
    weights[found] = np.median(frequency) / frequency
    return weights


def class_weights(dataset: DataSet, kind: str) -> Tensor | None:
    """float32 [K] for "median-frequency", None for "none"."""
    if kind == "none":
        return None
    return torch.from_numpy(median_frequency(*count_pixels(dataset))).float()
