"""The pictures that int8 is calibrated on."""

from pathlib import Path

from srdeploy import console
from srdeploy.data.dataset import LAYOUTS
from srdeploy.data.pairs import photos_below
from srdeploy.errors import UserError
from srdeploy.imaging import PHOTO_SUFFIXES, Pixels, fit, read_photo
from srdeploy.spec import Spec

RECOMMENDED = 64
LEAST = 8
"""With fewer, ranges are a matter of chance; they are taken where no more were asked for."""

_SPLIT = "train"


def calibration_pictures(folder: Path, spec: Spec, count: int) -> list[Pixels]:
    """`count` photos of `folder`, spread evenly over it by name, fitted as `spec` says.

    folder: photos, also in sub-folders, or a data set, of which the split train is taken. Returns
    uint8 [H, W, 3] each, of different sizes where the photos differ; always the same ones. All are
    taken where there are fewer than `count`, with a warning. Raises UserError where there are none
    or too few, for one that can't be read or is too small, and for a data set without train.
    """
    files = _files(folder)
    if not files:
        kinds = ", ".join(sorted(PHOTO_SUFFIXES))
        raise UserError(
            f"{folder} has no photos to calibrate int8 on: {kinds} are looked for, also in "
            f"sub-folders; {RECOMMENDED} photos like those that the network will see are "
            "recommended"
        )
    found = len(files)
    if found < min(count, LEAST):
        raise UserError(
            f"{folder} has {found} photos, too few to calibrate int8 on: {RECOMMENDED} are "
            f"recommended, {LEAST} at least"
        )
    if found < count:
        console.warn(f"{folder} has {found} photos to calibrate int8 on, not {count}: all are used")
    chosen = [files[index * found // min(count, found)] for index in range(min(count, found))]
    return [fit(read_photo(file), spec) for file in chosen]


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"no such folder of photos: {folder}")
    if (folder / "images" / _SPLIT).is_dir():
        return photos_below(folder / "images" / _SPLIT)
    for layout in LAYOUTS.values():
        home = layout.home(folder)
        splits = layout.splits(home) if home is not None else ()
        if home is None or not splits:
            continue
        if _SPLIT not in splits:
            raise UserError(
                f"{folder} is a data set without the split {_SPLIT} (it has {', '.join(splits)}): "
                "give the folder of the photos that int8 shall be calibrated on"
            )
        pairs = layout.pairs(home, _SPLIT)
        items = sorted((*pairs.items, *pairs.bare), key=lambda item: item.name)
        return [item.image for item in items]
    return photos_below(folder)
