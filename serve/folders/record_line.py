"""A record as one line of JSON."""

import json
import os
import re
from typing import Any

from srdeploy.serve.folders.photo import Photo
from srdeploy.serve.folders.record import OutputFile, Record

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
