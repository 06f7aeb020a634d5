"""The core time that a photo takes besides the network: what is left of the raw rate without it."""

import time
from collections.abc import Sequence
from pathlib import Path

from folder_peers import Codec

from srdeploy.imaging import Pixels, decode_photo, encode_mask, fit, restore
from srdeploy.serve.folders.records import Photo
from srdeploy.serve.folders.settings import PredictSettings
from srdeploy.serve.folders.stores import LocalStore
from srdeploy.serve.folders.worker import FileTask, read_bytes
from srdeploy.spec import Spec

Cost = dict[str, float]
"""Milliseconds of one core for a photo. ours: reading, decoding, fitting, restoring, encoding and
writing; ours_recorded: what a job does, which also takes checksums and counts labels; pillow: the
peers' codec."""


class CodecCost:
    """Goes through the photos in one thread, with labels that are known. Nothing else may run:
    caches are shared."""

    def __init__(
        self, graph: Path, spec: Spec, files: Sequence[Path], labels: Sequence[Pixels], out: Path
    ) -> None:
        """labels: of each photo, uint8 [H, W]. out: a folder for the masks."""
        self._spec = spec
        self._files = files
        self._peers = Codec(graph, files)
        self._out = out
        self._store = LocalStore(str(out))
        # As the network gives them: at its own size.
        self._labels = []
        for index, one in enumerate(labels):
            height, width = self._peers.read(index).photo.shape[:2]
            self._labels.append(restore(one, height, width))
        out.mkdir(parents=True, exist_ok=True)
        self.measure()

    def measure(self) -> Cost:
        """One pass of each."""
        found = {}
        for name, one in (
            ("ours", self._ours),
            ("ours_recorded", self._ours_recorded),
            ("pillow", self._pillow),
        ):
            began = time.thread_time()
            for index in range(len(self._files)):
                one(index)
            found[name] = 1000 * (time.thread_time() - began) / len(self._files)
        return found

    def _ours(self, index: int) -> None:
        file = self._files[index]
        photo = decode_photo(read_bytes(str(file)), file.name)
        fit(photo, self._spec)
        labels = restore(self._labels[index], photo.shape[0], photo.shape[1])
        self._store.write(f"{file.stem}.png", encode_mask(labels, self._spec))

    def _ours_recorded(self, index: int) -> None:
        file = self._files[index]
        photo = Photo(str(file), file.stem, 0, 0)
        task = FileTask(photo, self._spec, PredictSettings(), self._store)
        task.prepare()
        task.finish(self._labels[index][None])

    def _pillow(self, index: int) -> None:
        self._peers.write(self._peers.read(index), self._labels[index], self._out)


def ceiling(raw_rate: float, cores: int, codec_ms: float) -> float:
    """Share of the raw rate (images/s of all cores) that is left when each photo takes `codec_ms`
    of a core besides."""
    network_ms = 1000 * cores / raw_rate
    return network_ms / (network_ms + codec_ms)
