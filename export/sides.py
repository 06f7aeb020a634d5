"""The ways in which a converted graph, or an engine, is run to verify it."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from srdeploy.export.certificate import read_model
from srdeploy.export.comparison import expose_logits
from srdeploy.export.precision.rounding import emulate
from srdeploy.imaging import Pixels
from srdeploy.precision import Precision
from srdeploy.serve.artifact import Artifact
from srdeploy.serve.runtime import Runtime, open_runtime
from srdeploy.spec import Spec

EMULATED = "rounding emulated in float32 by onnxruntime"
"""How 16-bit graphs are computed besides running the file: every 16-bit tensor is rounded. On CPUs
onnxruntime keeps float32 between fp16 nodes, which would hide overflow, and it has no bf16."""

HALVES = ("fp16", "bf16")
UNTYPED = ("fp32", "tf32")
"""Their graph is the float32 one."""


@dataclass(frozen=True)
class Side:
    """One way of running a graph, open."""

    computed_by: str
    labels: Runtime | None
    """What gives labels; None: they are taken from the logits."""
    logits: Runtime | None
    """What gives logits; None: labels alone can be had."""

    def run(self, images: Pixels) -> tuple[Pixels, npt.NDArray[np.float32] | None]:
        """images uint8 [N, H, W, 3] -> labels uint8 [N, H, W], logits float32 [N, K, H, W]."""
        logits = None if self.logits is None else self.logits.logits(images)
        if self.labels is not None:
            return self.labels.run(images), logits
        assert logits is not None
        return logits.argmax(1).astype(np.uint8), logits


def open_reference(file: Path, spec: Spec, folder: Path, stack: ExitStack) -> Side:
    """The float32 graph in onnxruntime on the CPU; a copy with its logits exposed goes to
    `folder`."""
    exposed = folder / "reference.onnx"
    expose_logits(file, exposed)
    return Side("onnxruntime float32", None, stack.enter_context(open_runtime(exposed, spec=spec)))


def open_sides(
    artifact: Artifact,
    spec: Spec,
    precision: Precision,
    runtime: str,
    device: str | None,
    folder: Path,
    stack: ExitStack,
) -> list[Side]:
    """Every way in which the candidate is judged; files needed for them go to `folder`.

    16-bit graphs run with their rounding emulated and, where onnxruntime has the type (fp16), as
    they are. Raises UserError where a runtime can't be had.
    """
    device = device or ("cuda" if artifact.kind == "engine" else "cpu")
    if artifact.kind == "engine":
        engine = stack.enter_context(open_runtime(artifact.path, device, runtime, spec))
        known = artifact.signature is not None and artifact.signature.logits is not None
        return [Side(_name(engine), engine, engine if known else None)]
    sides = []
    emulated = precision in HALVES and runtime in ("auto", "onnxruntime")
    if emulated:
        rounded = folder / "emulated.onnx"
        onnx.save(emulate(read_model(artifact.file)), str(rounded))
        expose_logits(rounded, rounded)
        inside = stack.enter_context(open_runtime(rounded, spec=spec))
        sides.append(Side(EMULATED, None, inside))
    if not (emulated and precision == "bf16"):
        exposed = folder / "candidate.onnx"
        expose_logits(artifact.file, exposed)
        inner = precision if runtime == "openvino" and precision in HALVES else None
        whole, inside = (
            stack.enter_context(open_runtime(file, device, runtime, spec, precision=inner))
            for file in (artifact.path, exposed)
        )
        sides.append(Side(_name(whole), whole, inside))
    return sides


def _name(runtime: Runtime) -> str:
    return f"{runtime.backend}, {runtime.device}, {runtime.precision}"
