"""A TensorRT engine's sidecar: what the plan file itself does not tell, as JSON beside it.

The plan stays pure, so that trtexec, Triton and others load it.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from srdeploy.errors import UserError
from srdeploy.files import read_json, write_json
from srdeploy.precision import Precision
from srdeploy.serve.signature import Signature
from srdeploy.spec import Spec
from srdeploy.validation import Settings, validated

Builder = Literal["tensorrt", "rtx"]


class Profile(Settings):
    """One optimisation profile: shapes (N, H, W) of the images."""

    smallest: tuple[int, int, int]
    usual: tuple[int, int, int]
    largest: tuple[int, int, int]


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
