"""A few photos of a folder, for checks and reports."""

from pathlib import Path

from srdeploy.errors import UserError
from srdeploy.imaging import PHOTO_SUFFIXES, Pixels, read_photo


def first_photos(folder: Path, count: int) -> list[Pixels]:
    """The first `count` photos of `folder` by name, decoded. Raises UserError where there are
    none."""
    if not folder.is_dir():
        raise UserError(f"no such folder of photos: {folder}")
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in PHOTO_SUFFIXES)
    if not files:
        raise UserError(f"{folder} has no photos: give a folder with .jpg or .png files")
    return [read_photo(file) for file in files[:count]]
