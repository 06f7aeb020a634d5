"""Masks that contenders wrote, beside those of `srdeploy evaluate`."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from plain_runtime import decode
from same_labels import compare_labels

from srdeploy.imaging import Pixels, UnreadableImageError, read_labels, read_photo
from srdeploy.runtimes.registry import open_runtime
from srdeploy.serve.evaluate import predict_labels

KINDS = ("same", "rounded", "wrong", "missing")
"""What a mask may be, by its labels; see same_labels."""


class ExpectedMasks:
    """The labels of each photo at its own size, as `evaluate` would score them."""

    def __init__(
        self, graph: Path, files: Sequence[Path], runtime: str, precision: str | None
    ) -> None:
        """Runs the network over all photos, with one thread."""
        self.ours: list[Pixels] = []
        """Of photos as `evaluate` reads them."""
        self.peers: list[Pixels] = []
        """Of photos as the peers decode them; the same objects where the pixels are the same."""
        self._files = files
        with open_runtime(graph, runtime=runtime, threads=1, precision=precision) as opened:
            for file in files:
                photo, plain = read_photo(file), decode(file.read_bytes())
                labels = predict_labels(opened, photo, file)
                self.ours.append(labels)
                same = np.array_equal(photo, plain)
                self.peers.append(labels if same else predict_labels(opened, plain, file))

    def judge(self, out: Path, wanted: Sequence[Pixels]) -> Counter[str]:
        """How many masks below `out` are what, by KINDS. wanted: `ours` or `peers`."""
        found: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
        for file, labels in zip(self._files, wanted, strict=True):
            try:
                mask = read_labels(out / f"{file.stem}.png")
            except UnreadableImageError:
                found["missing"] += 1
            else:
                found[compare_labels(mask, labels)] += 1
        return found
