"""A TensorRT engine's sidecar: what the plan file itself does not tell, as JSON beside it.

The plan stays pure, so that trtexec, Triton and others load it.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from srdeploy.errors import UserError
from srdeploy.files import read_json, sha256_of, write_json
from srdeploy.precision import Precision
from srdeploy.serve.artifact import ENGINE_SUFFIX
from srdeploy.serve.signature import Signature
from srdeploy.spec import Spec
from srdeploy.validation import Settings, validated

Builder = Literal["tensorrt", "rtx"]


class Profile(Settings):
    """One optimisation profile: shapes (N, H, W) of the images."""

    smallest: tuple[int, int, int]
    usual: tuple[int, int, int]
    largest: tuple[int, int, int]

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        for low, middle, high in zip(self.smallest, self.usual, self.largest, strict=True):
            if not 1 <= low <= middle <= high:
                raise ValueError(f"its shapes must grow from 1 on, this is {self.text()}")
        return self

    def text(self) -> str:
        """E.g. "1x32x32,1x360x480,4x720x960": N x H x W, smallest, usual, largest."""
        shapes = (self.smallest, self.usual, self.largest)
        return ",".join("x".join(map(str, shape)) for shape in shapes)

    def covers(self, shape: tuple[int, int, int]) -> bool:
        """Whether images of `shape` (N, H, W) lie within it."""
        triples = zip(self.smallest, shape, self.largest, strict=True)
        return all(low <= side <= high for low, side, high in triples)


class EngineSidecar(Settings):
    """Where, from what and how an engine was built."""

    version: Literal[1] = 1
    builder: Builder
    """TensorRT proper, or TensorRT for RTX."""
    builder_version: str
    """Of the package, e.g. 11.4.0.106."""
    compute_capabilities: tuple[str, ...]
    """Those it runs on, e.g. ("8.9",)."""
    gpu: str | None
    """Name of the GPU it was built on; None where it was built ahead of time."""
    cuda_driver: str | None
    """Version that the driver offers, e.g. 13.0; None where there was none."""
    precision: Precision
    """What was asked for, and found in the layers."""
    layer_types: dict[str, int]
    """Type -> number of layers that compute in it, read back after parsing or from the engine."""
    read_from: Literal["engine", "network"]
    """Where layer_types was read: the built engine's layers, or, without a GPU to load it, the
    strongly typed network, whose types bind the builder."""
    profiles: tuple[Profile, ...]
    refittable: bool = False
    engine_sha256: str
    engine_bytes: int
    onnx: str
    """Name of the ONNX file."""
    onnx_sha256: str
    command: str
    """Builds it again."""
    spec: Spec
    signature: Signature
    figures: dict[str, Any] = Field(default_factory=dict)
    """Build time, memory and the like."""


def sidecar_path(engine: Path) -> Path:
    """NAME.engine.json beside NAME.engine."""
    return engine.with_name(engine.name + ".json")


def write_sidecar(engine: Path, sidecar: EngineSidecar) -> None:
    """Writes it beside the engine, whole."""
    write_json(sidecar_path(engine), sidecar.model_dump(mode="json"))


def read_sidecar(engine: Path) -> EngineSidecar:
    """Raises UserError where it is absent or not one of ours."""
    path = sidecar_path(engine)
    if not path.is_file():
        raise UserError(
            f"{engine} has no {path.name} beside it, which says what it takes and where it runs: "
            "copy both files, or build it again (srdeploy export RUN --trt)"
        )
    return validated(EngineSidecar, read_json(path), str(path))


def engine_name(gpu: str | None, capabilities: Sequence[str], stem: str = "model") -> str:
    """E.g. model.nvidia-l4.engine, or, built ahead of time, model.sm86-sm89.engine."""
    if gpu is not None:
        where = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    else:
        where = "-".join(f"sm{capability.replace('.', '')}" for capability in capabilities)
    return f"{stem}.{where}{ENGINE_SUFFIX}"


def check_whole(engine: Path, sidecar: EngineSidecar) -> None:
    """Raises UserError where `engine` is not the file that the sidecar was written for."""
    size = engine.stat().st_size if engine.is_file() else None
    if size is None:
        raise UserError(f"no such engine: {engine}")
    again = f"copy both files again, or build it: {sidecar.command}"
    if size < sidecar.engine_bytes:
        raise UserError(
            f"{engine} is truncated: it has {size:,} of {sidecar.engine_bytes:,} bytes; {again}"
        )
    if sha256_of(engine) != sidecar.engine_sha256:
        raise UserError(
            f"{engine} is not the engine that {sidecar_path(engine).name} describes (another "
            f"SHA-256): {again}"
        )
