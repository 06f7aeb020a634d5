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
"""Of zlib. The files of higher ones are hardly smaller, and take several times as long."""
BAND = 64
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
            # np.savez_compressed writes down the time of day.
            entry = zipfile.ZipInfo(f"{name}.npy")
            entry.compress_type = zipfile.ZIP_DEFLATED
            large = array.nbytes >= zipfile.ZIP64_LIMIT // 2
            with archive.open(entry, "w", force_zip64=large) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
    return buffer.getvalue()


def softmax(logits: Logits) -> Probabilities:
    """Over the K classes of logits float32 [K, h, w], in float32; rounded to float16 at the end."""
    probabilities = np.empty(logits.shape, np.float16)
    for top in range(0, logits.shape[1], BAND):
        rows = logits[:, top : top + BAND]
        powers = np.exp(rows - rows.max(axis=0))
        probabilities[:, top : top + BAND] = powers / powers.sum(axis=0)
    return probabilities
