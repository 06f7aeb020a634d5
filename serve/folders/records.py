"""Photos of a job, what became of them, and that as a line of JSON."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Photo:
    """One photo of a job."""

    path: str
    """The path as found: local (bytes that are not UTF-8 as surrogates) or a URL."""
    name: str
    """Where its outputs go, below the output folder and without their suffix: relative, with /,
    never with `..`. No two photos of a job share it."""
    bytes: int
    """Size of the file when it was listed."""
    changed_ns: int
    """When it was changed last, in nanoseconds since 1970; 0 where the file system can't tell."""


@dataclass(frozen=True)
class Unusable:
    """Something in the sources that can't be listed, read or named."""

    path: str
    reason: str


# What became of one photo.


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
    """Time in the runtime; for a run of several photos, the share of one."""
    encode: float = 0.0
    """Restoring, encoding and writing."""


@dataclass(frozen=True)
class Record:
    """One photo that is done, or why it was skipped; a line of the manifest."""

    photo: Photo
    """If even listing failed: its path, an empty name and zeros."""
    sha256: str = ""
    """SHA-256 of the photo's file; empty if it was not read."""
    size: tuple[int, int] | None = None
    """(height, width) of the photo, upright."""
    outputs: Mapping[str, OutputFile] = field(default_factory=dict)
    """Written files by their path below the output folder."""
    pixels: Mapping[int, int] = field(default_factory=dict)
    """How many pixels of the mask have each label; labels that do not occur are left out."""
    error: str | None = None
    """Why there are no outputs."""
    times: Times = Times()
    """Not kept in the manifest."""


# A record as one line of JSON.

_ESCAPED = re.compile(rb"\\(\\|x[0-9a-f]{2})")


def to_line(record: Record) -> bytes:
    """One line of JSON in UTF-8, with its line end.

    Names whose bytes are no UTF-8 would make the file unreadable: such a record is marked
    `"escaped": true`, and these bytes are \\xff in it, and a backslash \\\\.
    """
    photo = record.photo
    outputs = {
        path: {"bytes": output.bytes, "sha256": output.sha256}
        for path, output in record.outputs.items()
    }
    values: dict[str, Any] = {
        "photo": photo.path,
        "name": photo.name,
        "bytes": photo.bytes,
        "changed_ns": photo.changed_ns,
    }
    if record.error is not None:
        values["error"] = os.fsencode(record.error).decode("utf-8", "backslashreplace")
    if record.sha256:
        values["sha256"] = record.sha256
    if record.size is not None:
        values["size"] = record.size
    if not _is_utf8(photo.path + photo.name):
        values["photo"], values["name"] = _escape(photo.path), _escape(photo.name)
        values["escaped"] = True
        outputs = {_escape(path): output for path, output in outputs.items()}
    values["outputs"] = outputs
    values["pixels"] = record.pixels  # JSON's keys are text: "0": 1234
    return json.dumps(values, ensure_ascii=False).encode() + b"\n"


def from_line(line: bytes) -> Record:
    """The record of a line. Raises ValueError, KeyError, TypeError or AttributeError where it is
    none."""
    values = json.loads(line)
    read = _unescape if values.get("escaped") else str
    size = values.get("size")
    return Record(
        photo=Photo(
            read(values["photo"]),
            read(values["name"]),
            int(values["bytes"]),
            int(values["changed_ns"]),
        ),
        sha256=values.get("sha256", ""),
        size=None if size is None else (int(size[0]), int(size[1])),
        outputs={
            read(path): OutputFile(int(output["bytes"]), output["sha256"])
            for path, output in values["outputs"].items()
        },
        pixels={int(label): int(count) for label, count in values["pixels"].items()},
        error=values.get("error"),
    )


def name_and_verdict(line: bytes) -> tuple[bytes, bool]:
    """(the photo's name as bytes, whether it has outputs) of a line: what an index needs, sooner
    than by `from_line`. Raises as `from_line`."""
    values = json.loads(line)
    name = values["name"]
    if values.get("escaped"):
        name = _unescape(name)
    values["photo"], values["outputs"]  # damage shows here and not at the end of the job
    return os.fsencode(name), values.get("error") is None


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _escape(path: str) -> str:
    return os.fsencode(path).replace(b"\\", rb"\\").decode("utf-8", "backslashreplace")


def _unescape(text: str) -> str:
    return os.fsdecode(_ESCAPED.sub(_byte, text.encode()))


def _byte(match: re.Match[bytes]) -> bytes:
    what = match[1]
    return what if what == b"\\" else bytes([int(what[1:], 16)])
