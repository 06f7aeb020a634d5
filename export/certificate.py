"""The certificate: line by line, what was proved about an exported graph, with the figures."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto
from pydantic import Field

from srdeploy.artifacts.artifact import MODEL
from srdeploy.environment import describe_environment
from srdeploy.errors import UserError
from srdeploy.export.digest import graph_digest
from srdeploy.export.isomorphism import compare_graphs
from srdeploy.files import explain_os_error, sha256_of, write_json
from srdeploy.graph.signature import opset_of
from srdeploy.validation import Settings

CERTIFICATE = "certificate.json"

_LISTED = 20
"""Survivors that a certificate lists by name; their count is always there."""


class Line(Settings):
    """One statement of a certificate."""

    name: str
    passed: bool | None
    """None: recorded, not judged."""
    detail: str
    """A readable line that says what was found."""
    figures: dict[str, Any] = Field(default_factory=dict)


class Certificate(Settings):
    """What was proved, and what was not."""

    version: Literal[1] = 1
    lines: tuple[Line, ...]

    @property
    def passed(self) -> bool:
        """Whether no line failed."""
        return all(line.passed is not False for line in self.lines)

    def write(self, path: Path) -> None:
        """Writes it as JSON, with the verdict on top."""
        write_json(path, self.summary())

    def summary(self) -> dict[str, Any]:
        """The certificate as JSON values, with the verdict on top."""
        return {"passed": self.passed, **self.model_dump(mode="json")}


def certify_files(a: Path, b: Path) -> Certificate:
    """Certifies that the .onnx file `b` holds the graph of `a`, whatever their weights.

    Deploy folders stand for their model.onnx. Raises UserError where one can't be read.
    """
    file_a, file_b = model_file(a), model_file(b)
    left, right = read_model(file_a), read_model(file_b)
    return Certificate(
        lines=(*identity_lines(left, right), provenance_line({str(a): file_a, str(b): file_b}))
    )


def identity_lines(plain: ModelProto, deployed: ModelProto) -> tuple[Line, ...]:
    """The lines `identity`, `oracles` and `survivors`: is `deployed` the graph of `plain`?"""
    digests = graph_digest(plain), graph_digest(deployed)
    same_digest = digests[0] == digests[1]
    walk = compare_graphs(plain, deployed)
    equal = same_digest and walk.equal
    if equal:
        detail = f"the graph is the plain network's (digest {digests[0][:16]})"
    else:
        detail = walk.first_difference or "the digests differ"
    identity = Line(
        name="identity",
        passed=equal,
        detail=detail,
        figures={
            "digest_plain": digests[0],
            "digest_deployed": digests[1],
            "walk_equal": walk.equal,
            "first_difference": walk.first_difference,
            "nodes": len(deployed.graph.node),
            "opset": opset_of(deployed),
        },
    )
    agree = same_digest == walk.equal
    verdicts = f"digest: {_verdict(same_digest)}, side-by-side walk: {_verdict(walk.equal)}"
    oracles = Line(
        name="oracles",
        passed=agree,
        detail=f"both checks agree ({verdicts})" if agree else f"the checks disagree ({verdicts})",
    )
    count = len(walk.survivors)
    survivors = Line(
        name="survivors",
        passed=not count,
        detail=f"{count} survive, first {walk.survivors[0]}" if count else "nothing of an exit",
        figures={"count": count, "first": list(walk.survivors[:_LISTED])},
    )
    return identity, oracles, survivors


def provenance_line(files: Mapping[str, Path], **recorded: Any) -> Line:
    """What the verdict is about: files with their SHA-256, versions, machine. Not judged."""
    listed: dict[str, dict[str, Any]] = {
        label: {"sha256": sha256_of(path), "bytes": path.stat().st_size}
        for label, path in files.items()
    }
    digests = ", ".join(f"{label} {entry['sha256'][:16]}" for label, entry in listed.items())
    return Line(
        name="provenance",
        passed=None,
        detail=f"sha256 {digests}",
        figures={"files": listed, "environment": describe_environment(), **recorded},
    )


def text_digest(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def model_file(path: Path) -> Path:
    """The .onnx file that `path` stands for: itself, or a deploy folder's. Raises UserError."""
    if not path.is_dir():
        return path
    if not (path / MODEL).is_file():
        raise UserError(f"{path} has no {MODEL}: give an .onnx file or a deploy folder")
    return path / MODEL


def read_model(path: Path) -> ModelProto:
    """Reads and checks an .onnx file, with tensors in side files. Raises UserError."""
    broken = "not an ONNX file, or a truncated one: export it again"
    try:
        model = onnx.load(str(path), format="protobuf")  # else the suffix decides, e.g. .json
        if not model.graph.output:
            raise UserError(f"{path}: {broken}")
        onnx.checker.check_model(model)
    except DecodeError as error:
        raise UserError(f"{path}: {broken}") from error
    except onnx.checker.ValidationError as error:
        reason = next(iter(str(error).strip().splitlines()), "invalid")
        raise UserError(f"{path}: not a valid ONNX graph ({reason})") from error
    except OSError as error:
        raise explain_os_error(error, path) from error
    return model


def _verdict(equal: bool) -> str:
    return "equal" if equal else "different"
