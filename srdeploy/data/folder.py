"""The folder layout: images/SPLIT/NAME.jpg, labels/SPLIT/NAME.png and classes.json."""

from pathlib import Path

from srdeploy.data.classes import CLASSES_FILE, ClassTable, read_class_table
from srdeploy.data.pairs import Fault, Item, Pairs, masks_below, photos_below, plain_lookup
from srdeploy.errors import UserError


def home(root: Path) -> Path | None:
    """`root` where it is laid out so, else None."""
    return root if (root / "images").is_dir() else None


def splits(root: Path) -> tuple[str, ...]:
    """The sub-folders of images/, sorted."""
    folders = (p for p in (root / "images").iterdir() if p.is_dir())
    return tuple(sorted(p.name for p in folders if not p.name.startswith(".")))


def classes(root: Path) -> ClassTable:
    """The table in classes.json. Raises UserError where it is absent or wrong."""
    path = root / CLASSES_FILE
    if not path.exists():
        raise UserError(
            f"no {CLASSES_FILE} in {root}: it names the classes, by id from 0 on, for example "
            '{"names": ["background", "cow"], "ignore_index": 255}'
        )
    return read_class_table(path)


def pairs(root: Path, split: str) -> Pairs:
    """Photos with the masks of the same name."""
    images, labels = root / "images" / split, root / "labels" / split
    photos: dict[str, Path] = {}
    faults: list[Fault] = []
    for photo in photos_below(images):
        name = _name(photo, images)
        if name in photos:
            detail = f"{photos[name].name} has the same name: the mask could belong to either"
            faults.append(Fault(kind="two photos of one name", path=str(photo), detail=detail))
        photos.setdefault(name, photo)
    masks = {_name(mask, labels): mask for mask in masks_below(labels)}
    bare: list[Item] = []
    for name in sorted(photos.keys() - masks.keys()):
        mask = Path(f"{labels / name}.png")
        bare.append(Item(name, photos[name], mask))
        detail = f"a mask is looked for at {mask} (lossless: JPEG can't hold class ids)"
        faults.append(Fault(kind="photo without mask", path=str(photos[name]), detail=detail))
    for name in sorted(masks.keys() - photos.keys()):
        detail = f"a photo is looked for at {images / name}.jpg or .png"
        faults.append(Fault(kind="mask without photo", path=str(masks[name]), detail=detail))
    items = tuple(Item(n, photos[n], masks[n]) for n in sorted(photos.keys() & masks.keys()))
    return Pairs(items, tuple(faults), plain_lookup(classes(root)), tuple(bare))


def all_photos(root: Path) -> dict[Path, str]:
    """Every photo of every split, with its name in there."""
    folders = [root / "images" / split for split in splits(root)]
    return {photo: _name(photo, base) for base in folders for photo in photos_below(base)}


def _name(path: Path, base: Path) -> str:
    return path.relative_to(base).with_suffix("").as_posix()
