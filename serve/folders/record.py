"""What became of one photo."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from srdeploy.serve.folders.photo import Photo


@dataclass(frozen=True)
class OutputFile:
    """One file that was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Times:
    """Milliseconds that one photo took, by step; steps of different photos overlap."""

    decode: float = 0.0
    """Reading, decoding and fitting."""
    run: float = 0.0
    """In the runtime; its share of a run of several photos."""
    encode: float = 0.0
    """Restoring, encoding and writing."""


@dataclass(frozen=True)
class Record:
    """One photo that is done, or why it was skipped; a line of the manifest."""

    photo: Photo
    """For what could not even be listed: its path, an empty name and zeros."""
    sha256: str = ""
    """Of the photo's file; empty where it was not read."""
    size: tuple[int, int] | None = None
    """(height, width) of the photo, upright."""
    outputs: Mapping[str, OutputFile] = field(default_factory=dict)
    """By their path below the output folder."""
    pixels: Mapping[int, int] = field(default_factory=dict)
    """How many pixels of the mask have each label; labels that do not occur are left out."""
    error: str | None = None
    """Why there are no outputs."""
    times: Times = Times()
    """Not kept in the manifest."""
