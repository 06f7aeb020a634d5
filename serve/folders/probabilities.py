"""Probabilities of one photo's classes as an npz file."""

import zipfile
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt

from srdeploy.serve.runtime import Logits
from srdeploy.spec import Spec

Probabilities = npt.NDArray[np.float16]

LEVEL = 1
"""Of zlib. At 6, files get 5 % smaller and take twice as long (19 classes, half a megapixel)."""
BAND = 16
"""Rows that are worked on at a time: exponentials of a whole large photo are gigabytes."""


def encode_probabilities(logits: Logits, size: tuple[int, int], spec: Spec) -> bytes:
    """Logits float32 [K, h, w] as an npz file that `np.load` reads as it is.

    `probabilities` float16 [K, h, w], at the size that the network saw; `classes`, the K names;
    `photo_size`, (height, width) of the photo, `size`. Equal logits give equal bytes.
    """
    arrays: dict[str, npt.NDArray[Any]] = {
        "probabilities": softmax(logits),
        "classes": np.array(spec.classes),
        "photo_size": np.array(size, np.int64),
    }
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=LEVEL) as archive:
        for name, array in arrays.items():
            large = array.nbytes >= zipfile.ZIP64_LIMIT // 2
            # Opened by name, entries get a fixed date: equal arrays are equal bytes.
            with archive.open(f"{name}.npy", "w", force_zip64=large) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
    return buffer.getvalue()


def softmax(logits: Logits) -> Probabilities:
    """Over the K classes of logits float32 [K, h, w], in float32; rounded to float16 at the end."""
    probabilities = np.empty(logits.shape, np.float16)
    for top in range(0, logits.shape[1], BAND):
        rows = logits[:, top : top + BAND]
        with np.errstate(invalid="ignore"):  # infinite logits: the file says NaN there
            powers = np.exp(rows - rows.max(axis=0))
            shares = powers / powers.sum(axis=0)
        probabilities[:, top : top + BAND] = to_half(shares)
    return probabilities


def to_half(values: npt.NDArray[np.float32]) -> Probabilities:
    """Values float32 of 0..1 as the nearest float16, as `astype` rounds them.

    Subnormal numbers, which most classes' probabilities are, take numpy ten times as long, for the
    processor's underflow is flagged at each. They are whole multiples of 2**-24, and these are
    their bits.
    """
    small = values < SMALLEST_NORMAL
    halves = np.where(small, SMALLEST_NORMAL, values).astype(np.float16)
    multiples = np.rint(np.where(small, values, 0) * np.float32(2**24)).astype(np.uint16)
    np.copyto(halves, multiples.view(np.float16), where=small)
    return halves


SMALLEST_NORMAL = np.finfo(np.float16).smallest_normal.astype(np.float32)
