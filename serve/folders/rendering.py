"""What is written of one photo, from the network's output."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from srdeploy.imaging import (
    Pixels,
    encode_gray,
    encode_jpeg,
    encode_mask,
    overlay,
    restore,
    strongest,
)
from srdeploy.serve.folders.photo import Photo
from srdeploy.serve.folders.probabilities import encode_probabilities
from srdeploy.serve.folders.segments import encode_segments
from srdeploy.serve.folders.settings import PredictSettings
from srdeploy.serve.runtime import Logits
from srdeploy.spec import Spec


@dataclass(frozen=True)
class Rendered:
    """The outputs of one photo, in memory."""

    files: dict[str, bytes]
    """Content by path below the output folder."""
    pixels: dict[int, int]
    """How many pixels of the mask have each label; labels that do not occur are left out."""


def needs_logits(settings: PredictSettings) -> bool:
    """Whether labels alone do not suffice."""
    return settings.probabilities


def needs_picture(settings: PredictSettings) -> bool:
    """Whether the photo itself is part of an output."""
    return settings.overlay


def render(
    photo: Photo,
    picture: Pixels | None,
    result: Pixels | Logits,
    size: tuple[int, int],
    spec: Spec,
    settings: PredictSettings,
) -> Rendered:
    """The outputs that `settings` ask for.

    picture: uint8 [H, W, 3], where `needs_picture` says so. result: labels uint8 [h, w], or logits
    float32 [K, h, w] where `needs_logits` says so. size: (H, W) of the photo, upright.
    """
    logits = np.asarray(result, np.float32) if needs_logits(settings) else None
    labels = np.asarray(result, np.uint8) if logits is None else strongest(logits)
    restored = restore(labels, size[0], size[1])
    files: dict[str, bytes] = {}
    if settings.mask == "palette":
        files[f"{photo.name}.png"] = encode_mask(restored, spec)
    elif settings.mask == "gray":
        files[f"{photo.name}.png"] = encode_gray(restored)
    if settings.overlay:
        assert picture is not None
        files[f"overlays/{photo.name}.jpg"] = encode_jpeg(overlay(picture, restored, spec))
    if logits is not None:
        files[f"probabilities/{photo.name}.npz"] = encode_probabilities(logits, size, spec)
    if settings.rle:
        files[f"rle/{photo.name}.json"] = encode_segments(photo.name, restored, spec)
    # Pillow counts bytes as they are, np.bincount makes each an int64 first.
    counts = Image.fromarray(restored).histogram()
    return Rendered(files, {label: count for label, count in enumerate(counts) if count})
