"""What reads and varies photos asks of a data set, whether it has masks or tags."""

from typing import Protocol

from srdeploy.data.classes import ClassTable
from srdeploy.data.pairs import Item
from srdeploy.imaging import Pixels


class PhotoSet(Protocol):
    """Photos of a split, with their labels or with what stands in for them."""

    @property
    def classes(self) -> ClassTable:
        """What labels can be."""

    @property
    def items(self) -> tuple[Item, ...]:
        """The photos, in their order."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Pixels, Pixels]:
        """Photo uint8 [H, W, 3] and labels uint8 [H, W] of one item. Raises UserError."""
