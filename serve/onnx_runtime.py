"""onnxruntime behind the runtime contract, on the CPU, CUDA, or TensorRT through its provider."""

import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy.typing as npt

from srdeploy.errors import MissingPackageError, UserError
from srdeploy.imaging import Pixels
from srdeploy.serve.artifact import Artifact
from srdeploy.serve.graph_runtime import GraphRuntime, arithmetic
from srdeploy.serve.optimised_graph import layer_types
from srdeploy.serve.runtime import ImageShapeError, parse_device
from srdeploy.spec import Spec

_TENSORRT = "TensorrtExecutionProvider"
_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"
_CALLED = {_TENSORRT: "TensorRT", _CUDA: "CUDA", _CPU: "the CPU"}

_WEIGHTED = ("Conv", "ConvTranspose", "MatMul", "Gemm")
"""Layers that must lie on the provider that was asked for. Shape arithmetic may stay on the CPU,
where onnxruntime puts it on purpose."""

_NODE_FAILED = re.compile(
    r".*while running (?P<kind>\S+) node\. Name:'(?P<name>.*?)' Status Message: (?P<why>.*)"
)


class OnnxRuntime(GraphRuntime):
    """An ONNX graph in onnxruntime.

    onnxruntime computes the whole graph whichever outputs are asked for: what is left in the graph
    costs its time. tensorrt: through its TensorRT provider, which builds its engine at the first
    run of each image size.
    """

    def __init__(
        self,
        artifact: Artifact,
        spec: Spec,
        device: str,
        threads: int | None,
        tensorrt: bool = False,
    ) -> None:
        super().__init__(artifact, spec, device)
        self.backend = "onnxruntime-tensorrt" if tensorrt else "onnxruntime"
        self._provider = _CPU
        if parse_device(device)[0] == "cuda":
            self._provider = _TENSORRT if tensorrt else _CUDA
        self._threads = threads
        self._session: Any = None

    def _open(self) -> None:
        ort = import_onnxruntime()
        self._require_offered(ort)
        options = ort.SessionOptions()
        options.log_severity_level = 4  # faults arrive as exceptions; the log would repeat them
        options.inter_op_num_threads = 1
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        # Idle workers must not burn the cores that decoding, encoding or another session needs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self._provider != _CPU:
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        stored = self.signature.precision
        if stored == "float32" or self._provider == _TENSORRT:
            session = self._load(ort, options)
            computed = stored
            if stored == "float32" and self._provider == _TENSORRT:
                computed = _float32_of_tensorrt()
        else:
            # Casts and quantisation are often computed away, or as float32: the graph that
            # onnxruntime made of this one tells.
            with TemporaryDirectory(prefix="srdeploy-") as folder:
                optimised = Path(folder) / "optimised.onnx"
                options.optimized_model_filepath = str(optimised)
                session = self._load(ort, options)
                computed = arithmetic(layer_types(optimised), stored)
        if self._provider != _CPU:
            require_provider(session, self._provider, self.device)
        session.disable_fallback()
        self.precision = computed
        self._session = session

    def _load(self, ort: Any, options: Any) -> Any:
        file = self.artifact.file
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # its fall-back notes: checked later
                return ort.InferenceSession(
                    str(file), sess_options=options, providers=self._providers()
                )
        except ort_errors() as error:
            if self._provider == _CPU and "bfloat16" in self.signature.precision:
                raise UserError(
                    f"{file}: onnxruntime has no bfloat16 layers for CPUs ({first_line(error)}): "
                    "use --runtime openvino, or export with --precision fp16"
                ) from error
            raise UserError(f"{file}: onnxruntime can't load it ({first_line(error)})") from error

    def _providers(self) -> list[Any]:
        """In the order of preference. What TensorRT leaves, such as casts of the input, is CUDA's;
        layers with weights are not, see require_provider."""
        _, index = parse_device(self.device)
        # TF32 would be a silent loss of precision.
        cuda = (_CUDA, {"device_id": str(index), "use_tf32": "0"})
        # No flag for fp16 or int8: without them the graph's own types bind the builder. Engines
        # kept from other sessions could be another graph's.
        tensorrt = (_TENSORRT, {"device_id": str(index), "trt_engine_cache_enable": "0"})
        wanted: dict[str, list[Any]] = {_CPU: [], _CUDA: [cuda], _TENSORRT: [tensorrt, cuda]}
        return [*wanted[self._provider], _CPU]

    def _close(self) -> None:
        self._session = None

    def _infer(
        self, images: Pixels, feed: npt.NDArray[Any], outputs: list[str]
    ) -> Sequence[npt.NDArray[Any]]:
        try:
            result = self._session.run(outputs, {self.signature.input_name: feed})
        except ort_errors() as error:
            raise ImageShapeError(
                f"{self.path}: onnxruntime failed on images {list(images.shape)} "
                f"({first_line(error)})"
            ) from error
        return cast(Sequence[npt.NDArray[Any]], result)

    def _require_offered(self, ort: Any) -> None:
        offered = ort.get_available_providers()
        if self._provider not in offered:
            raise UserError(
                f"device {self.device} was asked for, but the installed onnxruntime offers only "
                f"{', '.join(offered)}: pip install 'srdeploy[gpu]' in an environment without the "
                "CPU package, or use --device cpu"
            )


def require_provider(session: Any, provider: str, device: str) -> None:
    """Raises UserError unless `provider` has started and computes every layer with weights.

    session: opened with session.record_ep_graph_assignment_info, on `device`. onnxruntime itself
    goes on with another provider and says so in its log at most.
    """
    called = _CALLED[provider]
    started = session.get_providers()
    if provider not in started:
        needs = "the driver and the CUDA libraries"
        if provider == _TENSORRT:
            needs = "the driver, the CUDA libraries and TensorRT 10 (pip install 'tensorrt<11')"
        raise UserError(
            f"device {device} was asked for, but onnxruntime could not start {called} and "
            f"offers {', '.join(started)}: check {needs}, or use another --runtime or --device"
        )
    if not hasattr(session, "get_provider_graph_assignment_info"):
        raise UserError(
            "this onnxruntime does not tell which device computes what, so that a fall-back to "
            "the CPU would stay unseen: pip install -U 'onnxruntime-gpu>=1.24.1'"
        )
    placed = [
        (part.ep_name, node.op_type, node.name)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]
    stray = [one for one in placed if one[0] != provider and one[1] in _WEIGHTED]
    if stray:
        elsewhere, kind, name = stray[0]
        raise UserError(
            f"device {device} was asked for, but {called} does not take {len(stray)} layers of "
            f"this graph, such as {kind} '{name}' (left to {elsewhere}): use another --runtime"
        )
    if all(one[0] != provider for one in placed):
        raise UserError(
            f"device {device} was asked for, but {called} takes no node of this graph: use "
            "another --runtime"
        )


def _float32_of_tensorrt() -> str:
    """onnxruntime's TensorRT provider offers no way to forbid TF32 but this variable."""
    forbidden = os.environ.get("NVIDIA_TF32_OVERRIDE") == "0"
    return "float32" if forbidden else "float32 (TF32 allowed)"


def import_onnxruntime() -> Any:
    """The package; it is optional. Raises MissingPackageError with the pip line."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingPackageError("onnxruntime", "cpu", "running ONNX files") from error
    return onnxruntime


def ort_errors() -> tuple[type[Exception], ...]:
    """onnxruntime's exceptions have no common base of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (
        state.EPFail,
        state.Fail,
        state.InvalidArgument,
        state.InvalidGraph,
        state.InvalidProtobuf,
        state.NoModel,
        state.NoSuchFile,
        state.NotImplemented,
        state.RuntimeException,
    )


def first_line(error: BaseException) -> str:
    """What went wrong, from one of onnxruntime's errors; the node first, where it names one."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if failed := _NODE_FAILED.fullmatch(text):
        text = f"{failed['kind']} node '{failed['name']}': {failed['why']}".rstrip(": ")
    return text.removeprefix("[ONNXRuntimeError] : ")[:300]
