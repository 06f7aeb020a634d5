"""Batches of augmented photos. Which photo comes when, and how it is varied, follows from the seed
and the position only: not from the number of threads, not from what was read before. Resuming
needs no state."""

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from srdeploy.data import DataSet
from srdeploy.data.pairs import PhotoSet
from srdeploy.errors import UserError
from srdeploy.imaging import Pixels, fit
from srdeploy.spec import Spec
from srdeploy.train.augment import Augmentation, Sample, augment, sample_of, varied
from srdeploy.train.distributed import ALONE, World

ORDER, VIEW = 0, 1
"""First word of the streams of random numbers that order the photos and that vary them."""


@dataclass(frozen=True)
class Batch:
    """images uint8 [N, H, W, 3] RGB, labels uint8 [N, H, W]; where it began in the stream of
    samples; what is left to do on the device, float32 [N, 8], in the order of `Look`'s fields; how
    sure the labels are, uint8 [N, H, W], None: all of them are certain."""

    images: Tensor
    labels: Tensor
    position: int
    looks: Tensor | None = None
    confidence: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`, with nothing left to do."""
        images = _sent(self.images, device)
        maps = [_sent(one, device) for one in (self.labels, self.confidence) if one is not None]
        if self.looks is not None:
            images, maps = varied(images, maps, _sent(self.looks, device))
        return Batch(images, maps[0], self.position, None, *maps[1:])


def _sent(values: Tensor, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return values
    return values.pin_memory().to(device, non_blocking=True)


class Samples:
    """The endless stream of augmented samples of a split: position p is photo p mod n of a shuffled
    epoch."""

    def __init__(
        self,
        dataset: PhotoSet,
        spec: Spec,
        how: Augmentation,
        seed: int,
        cache_mib: int,
        confidence: bool = False,
    ) -> None:
        """confidence: whether samples have their masks' confidence too."""
        self.dataset = dataset
        self.spec = spec
        self.how = how
        self.seed = seed
        self.confidence = confidence
        self._room = cache_mib * 2**20
        self._cache: dict[int, Sample] = {}
        self._lock = Lock()

    def index(self, position: int) -> int:
        """Index of the photo at `position`: every photo once per epoch, each epoch in its own
        order."""
        epoch, place = divmod(position, len(self.dataset))
        return int(epoch_order(self.seed, epoch, len(self.dataset))[place])

    def read(self, position: int) -> Sample:
        """The sample at `position`. Raises UserError."""
        whole = self._fitted(self.index(position))
        rng = np.random.default_rng([self.seed, VIEW, position])
        return augment(whole.photo, whole.labels, self.how, rng, whole.confidence)

    def _fitted(self, index: int) -> Sample:
        """A photo, its labels and their confidence at the size that the network sees, kept in
        memory while there is room."""
        with self._lock:
            known = self._cache.get(index)
        if known is not None:
            return known
        photo, *maps = self.dataset.read(index)
        if self.confidence:
            assert isinstance(self.dataset, DataSet)  # tags have none
            maps.append(self.dataset.confidence(index))
        try:
            photo = fit(photo, self.spec)
        except UserError as error:
            raise UserError(f"{self.dataset.items[index].image}: {error}") from error
        if maps[0].shape != photo.shape[:2]:
            size = (photo.shape[1], photo.shape[0])
            maps = [_nearest(one, size) for one in maps]
        fitted = sample_of(photo, maps)
        taken = photo.nbytes + sum(one.nbytes for one in maps)
        with self._lock:
            if index not in self._cache and taken <= self._room:
                self._room -= taken
                self._cache[index] = fitted
        return fitted


def _nearest(values: Pixels, size: tuple[int, int]) -> Pixels:
    """A map at `size` (width, height)."""
    return np.asarray(Image.fromarray(values).resize(size, Image.Resampling.NEAREST))


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """Indices 0 .. count - 1 in the order of an epoch, int64 [count]."""
    return np.random.default_rng([seed, ORDER, epoch]).permutation(count)


def batches(
    samples: Samples, size: int, first: int, last: int, workers: int, world: World = ALONE
) -> Generator[Batch]:
    """Batches number `first` .. `last` - 1 of `size` samples each, read ahead by `workers` threads;
    of each the part of this process among those of `world`.

    Threads, not processes: decoding and resizing release the interpreter's lock, the cache is
    shared, and a killed run leaves nobody behind.
    """
    part = world.share(size)
    offset = world.rank * part
    if workers == 0:
        for number in range(first, last):
            start = number * size + offset
            yield collate([samples.read(start + i) for i in range(part)], start)
        return
    ahead = max(2, -(-2 * workers // part))
    pool = ThreadPoolExecutor(workers, thread_name_prefix="loader")
    pending: deque[list[Future[Sample]]] = deque()
    try:
        submitted = first
        for number in range(first, last):
            while submitted < min(number + 1 + ahead, last):
                start = submitted * size + offset
                pending.append([pool.submit(samples.read, start + i) for i in range(part)])
                submitted += 1
            found = [future.result() for future in pending.popleft()]
            yield collate(found, number * size + offset)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def collate(samples: list[Sample], position: int) -> Batch:
    """Samples of one size as a batch."""
    images = torch.from_numpy(np.stack([one.photo for one in samples]))
    labels = torch.from_numpy(np.stack([one.labels for one in samples]))
    looks = [one.look for one in samples if one.look is not None]
    sure = [one.confidence for one in samples if one.confidence is not None]
    return Batch(
        images,
        labels,
        position,
        torch.tensor(looks) if looks else None,
        torch.from_numpy(np.stack(sure)) if sure else None,
    )
