"""Photos of one size that are looked at together, and read ahead."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from srdeploy.data.classes import CLASSES_FILE, ClassTable
from srdeploy.data.confidence import confidence_path
from srdeploy.data.pairs import Item
from srdeploy.data.tags import TaggedSet
from srdeploy.errors import UserError
from srdeploy.files import explain_os_error, whole_file, write_whole
from srdeploy.imaging import Pixels, encode_gray, encode_mask, fit, fitted_size, photo_size
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


# The data set of pseudo masks, in the original's layout


class Mirror:
    """Writes a data set of the original's layout. Every file appears whole."""

    def __init__(self, folder: Path, origin: Path, layout: str) -> None:
        """origin: the home of the data set that is mirrored."""
        self.folder = folder
        self.origin = origin
        self.layout = layout

    def photo(self, item: Item) -> Path:
        """Where the item's photo lies in the mirror."""
        return self.folder / self._place(item.image)

    def mask(self, item: Item) -> Path:
        """Where the item's mask lies in the mirror."""
        return self.folder / self._place(item.label)

    def confidence(self, item: Item) -> Path:
        """Where the confidence of the item's mask lies in the mirror."""
        return confidence_path(self.folder, self.mask(item))

    def key(self, item: Item) -> Path:
        """The photo's path below the data set, without suffix: one for every item."""
        return self._place(item.image).with_suffix("")

    def add_photo(self, item: Item) -> None:
        """The photo itself where the file system can link to it, else a copy."""
        _share(item.image, self.photo(item))

    def add_true(self, item: Item) -> None:
        """Photo and mask as they are."""
        self.add_photo(item)
        _share(item.label, self.mask(item))

    def add_pseudo(
        self, item: Item, labels: Pixels, confidence: Pixels, spec: Spec, lookup: Sequence[int]
    ) -> None:
        """A photo with its pseudo mask and the mask's confidence, both uint8 [H, W].

        lookup: what raw values of this data set's masks mean (`Pairs.lookup`). The mask comes last:
        an item with a mask is complete.
        """
        self.add_photo(item)
        raw = raw_values(spec, lookup)
        plain = bool((raw[: spec.class_count] == np.arange(spec.class_count)).all())
        content = encode_mask(labels, spec) if plain else encode_gray(raw[labels])
        write_whole(self.confidence(item), encode_gray(confidence), sync=False)
        write_whole(self.mask(item), content, sync=False)

    def add_classes(self, classes: ClassTable) -> None:
        """The class table; Cityscapes' is known without."""
        if self.layout != "cityscapes":
            write_whole(self.folder / CLASSES_FILE, classes.model_dump_json(indent=1) + "\n")

    def add_list(self, split: str, items: Sequence[Item]) -> None:
        """The list of a split, in the layout that has lists."""
        if self.layout == "voc":
            lines = [f"/{self._place(i.image)} /{self._place(i.label)}\n" for i in items]
            path = self.folder / "ImageSets" / "Segmentation" / f"{split}.txt"
            write_whole(path, "".join(lines))

    def _place(self, path: Path) -> Path:
        try:
            return path.relative_to(self.origin)
        except ValueError as error:
            raise UserError(f"{path} lies outside the data set {self.origin}") from error


def raw_values(spec: Spec, lookup: Sequence[int]) -> Pixels:
    """uint8 [256]: label -> the raw value that the data set's masks have for it."""
    table = np.full(256, spec.ignore_index, np.uint8)
    for label in (*range(spec.class_count), spec.ignore_index):
        # The label's own value where that means it, else the first that does.
        table[label] = label if lookup[label] == label else list(lookup).index(label)
    return table


def _share(source: Path, target: Path) -> None:
    """Makes `target` the file `source`, by a hard link where it can be, else a copy."""
    if target.exists():
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source.resolve(), target)
        except OSError:
            # Another file system, or one without links.
            with whole_file(target, sync=False) as temporary:
                shutil.copyfile(source, temporary)
    except OSError as error:
        raise explain_os_error(error, target) from error
