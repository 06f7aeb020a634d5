"""Photos of one size that are looked at together, and read ahead."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from srdeploy.data.tags import TaggedSet
from srdeploy.errors import UserError
from srdeploy.imaging import Pixels, fit, fitted_size, photo_size
from srdeploy.spec import Spec

Read = TypeVar("Read")


@dataclass(frozen=True)
class PhotoGroup:
    """Some photos of a split, all of one size to the network."""

    tagged: TaggedSet
    indices: tuple[int, ...]


def groups_of_one_size(
    tagged: TaggedSet, spec: Spec, wanted: Sequence[int], most: int
) -> list[PhotoGroup]:
    """The items `wanted`, up to `most` together; reads the photos' headers."""
    open_groups: dict[tuple[int, int], list[int]] = {}
    found: list[PhotoGroup] = []
    for index in wanted:
        size = fitted_size(*photo_size(tagged.items[index].image), spec)
        group = open_groups.setdefault(size, [])
        group.append(index)
        if len(group) == most:
            found.append(PhotoGroup(tagged, tuple(open_groups.pop(size))))
    found += [PhotoGroup(tagged, tuple(group)) for group in open_groups.values()]
    return found


def read_fitted(tagged: TaggedSet, index: int, spec: Spec) -> tuple[Pixels, tuple[int, int]]:
    """A photo as the network sees it, uint8 [h, w, 3], and its own size (H, W). Raises
    UserError."""
    photo, _ = tagged.read(index)
    try:
        return fit(photo, spec), (photo.shape[0], photo.shape[1])
    except UserError as error:
        raise UserError(f"{tagged.items[index].image}: {error}") from error


def read_ahead(
    groups: Sequence[PhotoGroup], read: Callable[[TaggedSet, int], Read], workers: int
) -> Iterator[tuple[PhotoGroup, list[Read]]]:
    """Each group with what `read` gives for its items; `workers` threads read the next one
    meanwhile."""
    pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="reader")

    def submit(group: PhotoGroup) -> list[Future[Read]]:
        return [pool.submit(read, group.tagged, index) for index in group.indices]

    try:
        following = submit(groups[0]) if groups else []
        for number, group in enumerate(groups):
            pending = following
            following = submit(groups[number + 1]) if number + 1 < len(groups) else []
            yield group, [one.result() for one in pending]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
