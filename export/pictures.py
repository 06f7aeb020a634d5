"""The pictures that torch and an exported file are compared on."""

from pathlib import Path

import numpy as np

from srdeploy.data.synth import LEAST_SIDE, scene
from srdeploy.errors import UserError
from srdeploy.imaging import Pixels, read_photo, scaled_size
from srdeploy.runs import Run
from srdeploy.serve.photos import first_photos
from srdeploy.spec import Spec

MOST = 4
"""Of a folder, as many photos."""

_DRAWN = 3
_DRAWN_SIDE = 240
"""Longest side of drawn pictures, pixels; each size compared at is resized from it."""


def parity_images(run: Run, folder: Path | None) -> list[Pixels]:
    """Photos to compare on: those in `folder`, else those saved with the run. Raises UserError."""
    if folder is not None:
        return first_photos(folder, MOST)
    if not run.samples:
        raise UserError(
            f"{run.folder} has no sample photos to compare torch and the exported file on: "
            "give a folder of photos with --images"
        )
    return [read_photo(file) for file in run.samples[:MOST]]


def drawn_pictures(spec: Spec) -> list[Pixels]:
    """Made-up scenes of the usual size's proportions, for want of photos; always the same ones."""
    height, width = scaled_size(*spec.input.usual, _DRAWN_SIDE)
    size = max(height, LEAST_SIDE), max(width, LEAST_SIDE)
    return [scene(np.random.default_rng(seed), *size)[0] for seed in range(_DRAWN)]
