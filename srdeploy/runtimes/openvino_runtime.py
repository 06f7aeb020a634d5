"""OpenVINO behind the runtime contract, on the CPU, in an arithmetic that is asked for and
checked."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from srdeploy.artifacts.artifact import Artifact, Builder
from srdeploy.errors import UserError
from srdeploy.imaging import Pixels
from srdeploy.runtimes.base import ImageShapeError, RuntimeOptions
from srdeploy.runtimes.graph_runtime import GraphRuntime, arithmetic
from srdeploy.runtimes.registry import import_package
from srdeploy.spec import Spec

_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
_NAMES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16", "i8": "int8", "u8": "int8"}
_CAPABILITIES = {"bf16": "BF16", "fp16": "FP16"}
_LAYERS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
"""OpenVINO's names of what computes with weights."""


class OpenVINORuntime(GraphRuntime):
    """An ONNX graph in OpenVINO: one stream, tuned for the latency of one request.

    OpenVINO by itself computes a float32 graph in bfloat16 where the CPU is fast at that. Here it
    computes in `precision`, fp32 by default; quantised layers in int8, and by default layers stored
    in bfloat16 as the CPU does. One compiled network takes all sizes that the graph takes.
    """

    backend = "openvino"

    def __init__(self, artifact: Artifact, spec: Spec, options: RuntimeOptions) -> None:
        super().__init__(artifact, spec, options.device)
        self._wanted = options.precision or "fp32"
        # CPUs with bfloat16 compute layers stored so in it, whatever the hint: unless float32 was
        # asked for in so many words, that is what the artifact says.
        self._stored_will_do = options.precision is None
        self._threads = options.threads
        self._request: Any = None

    @classmethod
    def import_library(cls, builder: Builder | None = None) -> Any:
        """OpenVINO. Raises MissingPackageError."""
        return import_package(cls.backend)

    def _open(self) -> None:
        openvino = self.import_library()
        core = openvino.Core()
        self._require_offered(core)
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": _HINTS[self._wanted],
            # Pinned, the threads of two runtimes in one process would share their cores.
            "ENABLE_CPU_PINNING": False,
        }
        if self._threads is not None:
            settings["INFERENCE_NUM_THREADS"] = self._threads
        try:
            compiled = core.compile_model(str(self.artifact.file), "CPU", settings)
        except RuntimeError as error:
            raise UserError(
                f"{self.artifact.file}: OpenVINO can't load it ({_last_line(error)})"
            ) from error
        self.precision = self._require_precision(compiled)
        self._request = compiled.create_infer_request()
        # Two threads that ask for the first dtype at once, as first runs do, wait for each other
        # for ever: one has the interpreter's lock, the other that of OpenVINO's table.
        openvino.Type.u8.to_dtype()

    def _close(self) -> None:
        self._request = None

    def _infer(
        self, images: Pixels, feed: npt.NDArray[Any], outputs: list[str]
    ) -> Sequence[npt.NDArray[Any]]:
        try:
            self._request.infer({self.signature.input_name: feed}, share_inputs=True)
        except RuntimeError as error:
            raise ImageShapeError(
                f"{self.path}: OpenVINO failed on images {list(images.shape)} ({_last_line(error)})"
            ) from error
        # The request's memory is written again by the next run.
        return [np.array(self._request.get_tensor(name).data) for name in outputs]

    def _require_offered(self, core: Any) -> None:
        needed = _CAPABILITIES.get(self._wanted)
        offered = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if needed is not None and needed not in offered:
            kinds = ", ".join(one for one in offered if one in ("FP32", "BF16", "FP16", "INT8"))
            raise UserError(
                f"OpenVINO can't compute in {self._wanted} on this CPU "
                f"({core.get_property('CPU', 'FULL_DEVICE_NAME')}), which offers {kinds}: "
                "leave --precision away for fp32"
            )

    def _require_precision(self, compiled: Any) -> str:
        """What the layers of the compiled network compute in. Raises UserError where that is not
        what was asked for."""
        executed = _layer_types(compiled)
        wanted = _NAMES[_HINTS[self._wanted]]
        # With bf16 or fp16, OpenVINO keeps some layers in float32; with fp32 there is no choice.
        allowed = {wanted, "int8", "float32"}
        floats = executed - {"int8"}
        if self._stored_will_do:
            stored = set(self.signature.precision.split("+"))
            allowed |= stored
            floats -= stored
        if not executed <= allowed or (floats and wanted not in floats):
            raise UserError(
                f"{self.path}: {self._wanted} was asked for, but OpenVINO computes in "
                f"{'+'.join(sorted(executed))}: use another --precision"
            )
        return arithmetic(executed, self.signature.precision)


def _layer_types(compiled: Any) -> set[str]:
    """Types that the layers with weights of a compiled network are executed in."""
    found = set()
    for node in compiled.get_runtime_model().get_ordered_ops():
        told = node.get_rt_info()
        if told["layerType"].astype(str) in _LAYERS:
            kind = told["runtimePrecision"].astype(str)
            found.add(_NAMES.get(kind, kind))
    return found


def _last_line(error: BaseException) -> str:
    """The reason: OpenVINO's errors begin with where in its source they were raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
