"""Optimisation profiles: the range of shapes that an engine is built for, and the one that it is
best at."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from srdeploy.artifacts.artifact import Profile
from srdeploy.errors import UserError
from srdeploy.graph.signature import Signature
from srdeploy.imaging import PHOTO_SUFFIXES, fitted_size, photo_size
from srdeploy.spec import Spec
from srdeploy.validation import validated

EXAMPLE = "1x32x32,1x360x480,4x720x960"
"""A profile as text: N x H x W, smallest, usual, largest."""
_MOST = 65535
"""Largest side and batch that are believed."""


def profiles_of(spec: Spec, photos: Path | None = None, batch: int = 1) -> tuple[Profile, ...]:
    """The profile for networks of `spec`: batches from 1 to `batch`, 1 as usual.

    Sizes are the spec's smallest, usual and largest, or, where a folder of photos is given, the
    smallest, most frequent and largest at which the network sees them. Raises UserError.
    """
    policy = spec.input
    sizes = (policy.smallest, policy.usual, policy.largest)
    if photos is not None and not policy.fixed:
        sizes = photo_sizes(photos, spec)
    smallest, usual, largest = sizes
    return (Profile(smallest=(1, *smallest), usual=(1, *usual), largest=(batch, *largest)),)


def photo_sizes(
    folder: Path, spec: Spec
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Smallest, most frequent and largest (height, width) at which the network sees the photos in
    `folder` and below; only their headers are read.

    Raises UserError where there are none, or one is smaller than the network takes.
    """
    if not folder.is_dir():
        raise UserError(f"no such folder of photos: {folder}")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PHOTO_SUFFIXES)
    if not files:
        raise UserError(f"{folder} has no photos: give a folder with .jpg or .png files")
    counts: Counter[tuple[int, int]] = Counter()
    for file in files:
        size = fitted_size(*photo_size(file), spec)
        least = spec.input.smallest
        if size[0] < least[0] or size[1] < least[1]:
            raise UserError(
                f"{file}: {size[1]}x{size[0]} is too small: the network needs at least "
                f"{least[1]}x{least[0]} (width x height)"
            )
        counts[size] += 1
    heights, widths = zip(*counts, strict=True)
    usual = max(counts, key=lambda size: (counts[size], size))
    return (min(heights), min(widths)), usual, (max(heights), max(widths))


def parse_profile(text: str) -> Profile:
    """The profile written as `text`: three shapes such as EXAMPLE, or one for all three.

    Raises UserError naming the part that is wrong.
    """
    shapes = [_parse_shape(part, text) for part in text.split(",")]
    if len(shapes) == 1:
        shapes *= 3
    if len(shapes) != 3:
        raise UserError(
            f"profile '{text}': one or three shapes are needed (smallest, usual, largest), not "
            f"{len(shapes)}, e.g. {EXAMPLE}"
        )
    values = dict(zip(("smallest", "usual", "largest"), shapes, strict=True))
    return validated(Profile, values, f"profile '{text}'")


def check_profiles(
    profiles: Sequence[Profile], signature: Signature, spec: Spec, onnx: Path
) -> None:
    """Raises UserError where the graph can't take the shapes of a profile."""
    least = (1, *spec.input.smallest)
    for profile in profiles:
        for axis, name in enumerate(("batch", "height", "width")):
            fixed = signature.shape[axis]
            shapes = (profile.smallest, profile.usual, profile.largest)
            wrong = [shape[axis] for shape in shapes if fixed is not None and shape[axis] != fixed]
            if wrong:
                raise UserError(
                    f"profile {profile.text()}: {onnx} takes only {name} {fixed}, not {wrong[0]}"
                )
            if profile.smallest[axis] < least[axis]:
                raise UserError(
                    f"profile {profile.text()}: {name} {profile.smallest[axis]} is less than the "
                    f"network takes, {least[axis]}"
                )


def _parse_shape(part: str, text: str) -> tuple[int, int, int]:
    sides = part.strip().lower().split("x")
    if len(sides) != 3 or not all(_is_side(side) for side in sides):
        raise UserError(
            f"profile '{text}': '{part.strip()}' is no shape: batch x height x width is needed, "
            f"e.g. {EXAMPLE}"
        )
    batch, height, width = map(int, sides)
    return batch, height, width


def _is_side(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 7 and 1 <= int(text) <= _MOST
