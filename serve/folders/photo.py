"""What a listing finds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Photo:
    """One photo of a job."""

    path: str
    """As it was found: a local path (bytes that are no UTF-8 as surrogates) or a URL."""
    name: str
    """Where its outputs go, below the output folder and without their suffix: relative, with /,
    never with `..`. No two photos of a job share it."""
    bytes: int
    """Size of the file when it was listed."""
    changed_ns: int
    """When it was changed last, in nanoseconds since 1970; 0 where the file system can't tell."""


@dataclass(frozen=True)
class Unusable:
    """Something among the sources that can't be listed, read or named."""

    path: str
    reason: str
