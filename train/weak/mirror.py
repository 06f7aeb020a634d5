"""The data set that pseudo masks make: photos, masks and lists where those of the original lie."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from srdeploy.data.classes import CLASSES_FILE, ClassTable
from srdeploy.data.confidence import confidence_path
from srdeploy.data.pairs import Item
from srdeploy.errors import UserError
from srdeploy.files import explain_os_error, whole_file, write_whole
from srdeploy.imaging import Pixels, encode_gray, encode_mask
from srdeploy.spec import Spec


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
