"""Checking labels.csv or labels.json: its entries, and what they say against what masks show."""

from collections.abc import Mapping
from pathlib import Path

from srdeploy.data.classes import ClassTable
from srdeploy.data.pairs import Fault, FaultKind, Item, Pairs
from srdeploy.data.tag_file import Photos, class_ids, find_tag_file, read_tag_file
from srdeploy.data.tags import background_of, foreground_of
from srdeploy.errors import UserError


class TagCheck:
    """What a data set's tags file says of its splits; nothing at all where it has none."""

    def __init__(self, home: Path, classes: ClassTable, splits: Mapping[str, Pairs]) -> None:
        """Reads the file and no photo. Raises UserError where it can't be read, and where its
        classes have no background."""
        self.faults: list[Fault] = []
        """What is wrong with its entries."""
        self._classes = classes
        self._splits = splits
        self._tags: dict[Path, frozenset[int]] = {}
        """By the photo's path."""
        self.path = find_tag_file(home)
        if self.path is None:
            return
        self._foreground = frozenset(foreground_of(classes, background_of(classes)))
        items = {i.image: i for p in splits.values() for i in (*p.items, *p.bare)}
        self._read(list(items.values()), home)

    def _read(self, items: list[Item], home: Path) -> None:
        assert self.path is not None
        photos = Photos(items, home)
        for entry in read_tag_file(self.path):
            try:
                index, tags = photos.find(entry), class_ids(entry, self._classes)
            except UserError as error:
                text = str(error).removeprefix(f"{entry.where}: ")
                kind: FaultKind = "unknown class" if "no class" in text else "listed twice"
                self.faults.append(Fault(kind=kind, path=entry.where, detail=text))
                continue
            if index is None:
                detail = f"'{entry.image}' is no photo of the data set"
                fault = Fault(kind="listed photo missing", path=entry.where, detail=detail)
                self.faults.append(fault)
            elif items[index].image in self._tags:
                detail = f"{items[index].image} is tagged already"
                self.faults.append(Fault(kind="listed twice", path=entry.where, detail=detail))
            else:
                self._tags[items[index].image] = tags

    def alone(self, split: str) -> bool:
        """Whether tags are all that the split has: there is a file of them, and no mask."""
        pairs = self._splits[split]
        return self.path is not None and not pairs.items and bool(pairs.bare)

    def shown(self, item: Item) -> frozenset[int]:
        """The tags of a photo; none where the file does not name it."""
        return self._tags.get(item.image, frozenset())

    def untagged(self, split: str) -> list[Fault]:
        """A fault for each photo of the split that the file does not name."""
        detail = f"{self.path} does not name it; a photo with none of the classes has an empty list"
        return [
            Fault(kind="photo without tags", path=str(item.image), detail=detail)
            for item in self._splits[split].bare
            if item.image not in self._tags
        ]

    def compare(self, item: Item, in_mask: frozenset[int]) -> list[Fault]:
        """Where a photo has tags and a mask that could be read: whether they say the same."""
        tags = self._tags.get(item.image)
        if tags is None or not in_mask:
            return []
        names = self._classes.names
        faults = []
        for one in sorted((tags - in_mask) & self._foreground):
            detail = f"tagged '{names[one]}', of which its mask has no pixel"
            faults.append(Fault(kind="tag without pixels", path=str(item.image), detail=detail))
        for one in sorted((in_mask & self._foreground) - tags):
            detail = f"its mask shows '{names[one]}', which its tags lack"
            faults.append(Fault(kind="untagged class", path=str(item.image), detail=detail))
        return faults
