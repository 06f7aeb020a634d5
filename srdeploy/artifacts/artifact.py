"""What a run folder, a deploy folder, an .onnx or an .engine file is, and an engine's sidecar.

A TensorRT plan stays pure, so that trtexec, Triton and others load it: what the plan file itself
does not tell stands beside it as JSON.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator
from safetensors import safe_open

from srdeploy.data.classes import read_class_table
from srdeploy.errors import UserError
from srdeploy.files import read_json, sha256_of, write_json
from srdeploy.graph.signature import Signature, read_signature
from srdeploy.precision import Precision
from srdeploy.runs import is_run, open_run
from srdeploy.spec import Spec
from srdeploy.validation import Settings, validated

MODEL = "model.onnx"
"""The graph's file in a deploy folder."""
MANIFEST = "manifest.json"
"""What made a deploy folder, beside the graph."""
ENGINE_SUFFIX = ".engine"
"""Of a TensorRT plan; its sidecar is NAME.engine.json."""

Builder = Literal["tensorrt", "rtx"]
"""TensorRT proper, or TensorRT for RTX."""


@dataclass(frozen=True)
class Artifact:
    """Something that can be run."""

    kind: Literal["run", "deploy", "onnx", "engine"]
    path: Path
    """As it was given."""
    file: Path
    """The weights', graph's or engine's file."""
    spec: Spec | None
    """None for an ONNX file that other tools wrote."""
    signature: Signature | None
    """Of the ONNX file, or the one that the engine was built from; None for a run."""

    def count_weights(self) -> int:
        """Weight values stored in the file. In an ONNX file, batch norms may be folded away."""
        if self.signature is not None:
            return self.signature.weights
        with safe_open(self.file, framework="np") as stored:
            slices = [stored.get_slice(name) for name in stored.keys()]  # noqa: SIM118
        # Counters, such as batch norm's number of batches, are integers and no weights.
        return sum(prod(one.get_shape()) for one in slices if "F" in one.get_dtype())


def open_artifact(path: Path) -> Artifact:
    """Looks at `path`. Raises UserError where there is nothing, or nothing that can be run."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"no such file or folder: {path}")
    if path.is_dir():
        if is_run(path):
            run = open_run(path)
            return Artifact("run", path, run.weights, run.spec, None)
        if not (path / MODEL).is_file():
            raise UserError(
                f"{path} is neither a run folder (config.yaml and spec.json, see srdeploy train) "
                f"nor a deploy folder ({MODEL}, see srdeploy export)"
            )
        signature = read_signature(path / MODEL)
        return Artifact("deploy", path, path / MODEL, signature.spec, signature)
    if path.suffix.lower() == ENGINE_SUFFIX:
        sidecar = read_sidecar(path)
        return Artifact("engine", path, path, sidecar.spec, sidecar.signature)
    if path.suffix.lower() != ".onnx":
        raise UserError(f"{path}: give a run folder, a deploy folder, an .onnx or an .engine file")
    signature = read_signature(path)
    return Artifact("onnx", path, path, signature.spec, signature)


def spec_from_classes(path: Path) -> Spec:
    """The spec for an ONNX file without metadata: a data set's classes.json, or a run's spec.json.

    classes.json may also hold `mean` and `std` (RGB order, of values scaled to 0..1) and
    `colour_order`; ImageNet's mean and std, and RGB, are the default. Raises UserError.
    """
    content = read_json(path)
    if isinstance(content, dict) and "classes" in content:
        return validated(Spec, content, str(path))
    table = read_class_table(path)
    values = table.model_dump(exclude={"names"}) | {"classes": table.names}
    values |= {key: content[key] for key in ("mean", "std", "colour_order") if key in content}
    return validated(Spec, values, str(path))


# Engine sidecar


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
    """The version of the package, e.g. 11.4.0.106."""
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
