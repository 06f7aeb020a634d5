"""What a verb was given: a run folder, a deploy folder or an .onnx file."""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

from safetensors import safe_open

from srdeploy.data.classes import read_class_table
from srdeploy.errors import UserError
from srdeploy.files import read_json
from srdeploy.runs import is_run, open_run
from srdeploy.serve.signature import Signature, read_signature
from srdeploy.spec import Spec
from srdeploy.validation import validated

MODEL = "model.onnx"
"""The graph's file in a deploy folder."""
MANIFEST = "manifest.json"
"""What made a deploy folder, beside the graph."""
ENGINE_SUFFIX = ".engine"
"""Of a TensorRT plan; its sidecar is NAME.engine.json."""


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
        from srdeploy.serve.engine_file import read_sidecar

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
