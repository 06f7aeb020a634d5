"""How sure masks are: a data set's confidence/ holds a gray picture for a mask, by the mask's own
path.

The confidence of labels/train/a.png is confidence/labels/train/a.png, an 8-bit gray PNG of the
mask's size: 255 is certain, 0 counts for nothing.
"""

from collections.abc import Iterable
from pathlib import Path

from srdeploy.data.pairs import Item
from srdeploy.errors import UserError
from srdeploy.imaging import Pixels, photo_size, read_gray

FOLDER = "confidence"
"""Below the folder where the data set lies."""


def confidence_path(home: Path, mask: Path) -> Path:
    """Where the confidence of a mask lies. home: the data set's folder, which holds the mask."""
    return home / FOLDER / mask.relative_to(home).with_suffix(".png")


def read_confidence(home: Path, item: Item) -> Pixels:
    """The confidence of an item's mask, uint8 [H, W]. Raises UserError naming the file: unreadable,
    no 8-bit gray PNG, of another size."""
    path = confidence_path(home, item.label)
    found = read_gray(path, "confidence map")
    height, width = photo_size(item.image)
    if found.shape != (height, width):
        raise UserError(
            f"{path}: the map is {found.shape[1]}x{found.shape[0]}, its photo and mask "
            f"{width}x{height} (width x height): they must be equal"
        )
    return found


def require_confidence(home: Path, items: Iterable[Item]) -> None:
    """Raises UserError where an item's mask has none, naming the first and how many; reads no
    pixels."""
    paths = [confidence_path(home, item.label) for item in items]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(
            f"no such file: {missing[0]}; {len(missing)} of {len(paths)} masks have no confidence: "
            "add an 8-bit gray PNG for each (255 = certain), or give --set confidence=false"
        )
