"""Which photos a prediction covers, and which mask file each of them gets."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from srdeploy.errors import UserError
from srdeploy.files import explain_os_error
from srdeploy.imaging import PHOTO_SUFFIXES, Pixels, read_photo

CLASSES = "classes.json"
LEGEND = "legend.png"


@dataclass(frozen=True)
class Photo:
    """One photo and where its mask goes."""

    path: Path
    name: PurePath
    """The mask's path below the output folder, without its final suffix."""


def find_photos(sources: Sequence[Path], out: Path) -> tuple[Photo, ...]:
    """The photos in `sources` (folders, searched with their sub-folders, and files), by name.

    The mask of `a/b.jpg` is `a/b.png`. Where two photos would get one mask (b.jpg and b.tif), they
    keep their suffix: `a/b.jpg.png` and `a/b.tif.png`. Hidden files and what lies in `out` are
    passed over. Raises UserError: nothing there, no photos, `out` among the sources (the next
    prediction would take its masks for photos), or masks that would collide with each other or
    replace a photo.
    """
    for source in sources:
        if Path(source).is_dir() and Path(source).resolve() == out.resolve():
            raise UserError(
                f"{out} holds the photos, and masks among them would be taken for photos: "
                "give another --out, e.g. a new folder inside it"
            )
    found = {entry for source in sources for entry in _below(Path(source), out.resolve())}
    if not found:
        listed = ", ".join(map(str, sources))
        raise UserError(
            f"no photos in {listed}: {', '.join(sorted(PHOTO_SUFFIXES))} are looked for"
        )
    wanted = Counter(name.with_suffix("") for _, name in found)
    wanted[PurePath(LEGEND).with_suffix("")] += 1
    photos = []
    masks: dict[PurePath, Path] = {}
    for path, name in sorted(found, key=lambda entry: (str(entry[1]), str(entry[0]))):
        stem = name.with_suffix("") if wanted[name.with_suffix("")] == 1 else name
        if stem in masks:
            raise UserError(
                f"{masks[stem]} and {path} would get the same mask {out / stem}.png: "
                "predict their folders one by one"
            )
        masks[stem] = path
        photos.append(Photo(path, stem))
    originals = {path.resolve() for path, _ in found}
    for photo in photos:
        if mask_path(out, photo).resolve() in originals:
            raise UserError(
                f"the mask of {photo.path} would replace a photo: give another folder than {out}"
            )
    return tuple(photos)


def first_photos(folder: Path, count: int) -> list[Pixels]:
    """The first `count` photos of `folder` by name, decoded. Raises UserError where there are
    none."""
    if not folder.is_dir():
        raise UserError(f"no such folder of photos: {folder}")
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in PHOTO_SUFFIXES)
    if not files:
        raise UserError(f"{folder} has no photos: give a folder with .jpg or .png files")
    return [read_photo(file) for file in files[:count]]


def mask_path(out: Path, photo: Photo) -> Path:
    """Where the palette PNG of `photo` goes."""
    return out / photo.name.parent / f"{photo.name.name}.png"


def overlay_path(out: Path, photo: Photo) -> Path:
    """Where the picture of `photo` with its mask laid over goes."""
    return out / "overlays" / photo.name.parent / f"{photo.name.name}.jpg"


def _below(source: Path, out: Path) -> Iterator[tuple[Path, PurePath]]:
    """(path, path relative to the source) of each photo."""
    if not source.exists():
        raise UserError(f"no such file or folder: {source}")
    if not source.is_dir():
        yield source, PurePath(source.name)
        return
    for folder, below, files in os.walk(source, onerror=_raise):
        below[:] = [
            name
            for name in below
            if not name.startswith(".") and (Path(folder) / name).resolve() != out
        ]
        for name in files:
            path = Path(folder) / name
            if path.suffix.lower() in PHOTO_SUFFIXES and not name.startswith("."):
                yield path, PurePath(path.relative_to(source))


def _raise(error: OSError) -> None:
    raise explain_os_error(error, error.filename) from error
