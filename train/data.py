"""The data of a run: its splits, the Spec that they give, and class weights."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from srdeploy.console import track
from srdeploy.data import DataSet, open_dataset, spec_for
from srdeploy.data.confidence import require_confidence
from srdeploy.data.dataset import measured_policy
from srdeploy.data.pairs import PhotoSet
from srdeploy.errors import UserError
from srdeploy.spec import InputPolicy, Spec
from srdeploy.train.augment import augmentation_for
from srdeploy.train.config import TrainConfig
from srdeploy.train.loader import Samples
from srdeploy.validation import validated

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TrainingData:
    """Both splits, opened and checked."""

    training: DataSet
    validation: DataSet
    spec: Spec
    samples: Samples
    """The training split, augmented."""


def open_data(config: TrainConfig) -> TrainingData:
    """Opens both splits. Raises UserError where they can't be trained or validated on."""
    training = open_dataset(config.data, config.train_split, config.layout)
    validation = open_dataset(config.data, config.val_split, config.layout)
    if config.confidence:
        require_confidence(training.root, training.items)
    spec = configured_spec(config, training)
    # Refuses photos too small for a network here, rather than at the first validation.
    measured_policy(validation, config.longest_side)
    augmentation = augmentation_for(config, spec)
    samples = Samples(
        training, spec, augmentation, config.seed, config.cache_mib, config.confidence
    )
    return TrainingData(training, validation, spec, samples)


def configured_spec(config: TrainConfig, dataset: PhotoSet) -> Spec:
    """The spec of the networks that `config` trains on `dataset`. Raises UserError."""
    return spec_for(
        dataset,
        input_policy(config, dataset),
        mean=config.mean,
        std=config.std,
        colour_order=config.colour_order,
    )


def input_policy(config: TrainConfig, dataset: PhotoSet) -> InputPolicy:
    """Which sizes the run's network is given: the photos', or only the crop's; reads their
    headers. Raises UserError where a photo is too small."""
    measured = measured_policy(dataset, config.longest_side)
    values = measured.model_dump() | {"multiple": config.multiple, "smallest": config.smallest}
    if config.fixed_size:
        values |= dict.fromkeys(("smallest", "usual", "largest"), config.crop)
    return validated(InputPolicy, values, f"{config.data}, as the network is to see it")


def class_weights(dataset: DataSet, kind: str) -> Tensor | None:
    """float32 [K] for "median-frequency", None for "none"."""
    if kind == "none":
        return None
    return torch.from_numpy(median_frequency(*count_pixels(dataset))).float()


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
