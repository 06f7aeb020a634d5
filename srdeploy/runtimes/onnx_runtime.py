"""onnxruntime behind the runtime contract, on the CPU, CUDA, or TensorRT through its provider.

onnxruntime lists the providers that it was built with, whether or not their libraries are there,
and continues on the CPU where one does not start. So nothing here believes a list.
"""

import ctypes
import io
import os
import re
import time
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import local
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy.typing as npt

from srdeploy.artifacts.artifact import Artifact, Builder
from srdeploy.errors import MissingPackageError, UserError
from srdeploy.graph.operators import LAYERS
from srdeploy.imaging import Pixels
from srdeploy.runtimes.base import ImageShapeError, RuntimeOptions, parse_device
from srdeploy.runtimes.graph_runtime import GraphRuntime, arithmetic
from srdeploy.runtimes.registry import BACKENDS, join_words
from srdeploy.spec import Spec

if TYPE_CHECKING:
    import onnx

Provider = Literal["cpu", "cuda", "tensorrt"]

NAMES: dict[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_LIBRARIES = {
    "cuda": "libonnxruntime_providers_cuda.so",
    "tensorrt": "libonnxruntime_providers_tensorrt.so",
}
_CALLED = {"cpu": "the CPU", "cuda": "CUDA", "tensorrt": "TensorRT"}
_NEEDS = {
    "cuda": "the driver and the CUDA libraries",
    "tensorrt": "the driver, the CUDA libraries and TensorRT 10 (pip install 'tensorrt<11')",
}

_NAMES = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16", "DOUBLE": "float64"}
_BY_INTEGERS = ("QLinear", "ConvInteger", "MatMulInteger", "DynamicQuantize", "QGemm")
_NODE_FAILED = re.compile(
    r".*while running (?P<kind>\S+) node\. Name:'(?P<name>.*?)' Status Message: (?P<why>.*)"
)


class OnnxRuntime(GraphRuntime):
    """An ONNX graph in onnxruntime.

    onnxruntime computes the whole graph whichever outputs are asked for: what is left in the graph
    costs its time.
    """

    backend = "onnxruntime"

    def __init__(self, artifact: Artifact, spec: Spec, options: RuntimeOptions) -> None:
        super().__init__(artifact, spec, options.device)
        self._provider: Provider = parse_device(options.device)[0]
        self._threads = options.threads
        self._session: Any = None
        self._timing = local()

    @classmethod
    def import_library(cls, builder: Builder | None = None) -> Any:
        """onnxruntime. Raises MissingPackageError."""
        return import_onnxruntime()

    def timed_run(self, images: Pixels) -> tuple[Pixels, dict[str, float] | None]:
        """run, and {"compute_ms"}: the device's time without copies; None on the CPU, whose time is
        the host's."""
        if self._provider == "cpu":
            return super().timed_run(images)
        self._timing.wanted = True
        try:
            labels = self.run(images)
            return labels, {"compute_ms": self._timing.compute_ms}
        finally:
            self._timing.wanted = False

    def _open(self) -> None:
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 4  # faults arrive as exceptions; the log would repeat them
        options.inter_op_num_threads = 1
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        # Idle workers must not burn the cores that decoding, encoding or another session needs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self._provider != "cpu":
            require_offered(ort, self._provider, self.device)
            load_libraries(ort, self._provider)
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        stored = self.signature.precision
        if self._provider == "tensorrt":
            session = self._load(ort, options)
            computed = float32_of_tensorrt() if stored == "float32" else stored
        elif stored == "float32":
            session = self._load(ort, options)
            computed = stored
        else:
            # Casts and quantisation are often computed away, or as float32: the graph that
            # onnxruntime made of this one tells.
            with TemporaryDirectory(prefix="srdeploy-") as folder:
                optimised = Path(folder) / "optimised.onnx"
                options.optimized_model_filepath = str(optimised)
                session = self._load(ort, options)
                computed = arithmetic(layer_types(optimised), stored)
        if self._provider != "cpu":
            require_provider(session, self._provider, self.device)
        self.precision = computed
        self._session = session

    def _load(self, ort: Any, options: Any) -> Any:
        """A session on the provider that was asked for, or UserError."""
        file = self.artifact.file
        providers = provider_list(self._provider, parse_device(self.device)[1])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # its fall-back notes: checked below
                session = ort.InferenceSession(
                    str(file), sess_options=options, providers=providers, enable_fallback=0
                )
        except ort_errors() as error:
            if self._provider == "cpu" and "bfloat16" in self.signature.precision:
                others = join_words(
                    (one.name for one in BACKENDS if "bf16" in one.precisions), "or"
                )
                raise UserError(
                    f"{file}: onnxruntime has no bfloat16 layers for CPUs ({first_line(error)}): "
                    f"use --runtime {others}, or export with --precision fp16"
                ) from error
            raise UserError(f"{file}: onnxruntime can't load it ({first_line(error)})") from error
        except RuntimeError as error:
            if self._provider == "cpu":
                raise
            raise start_failure(ort, self._provider, self.device) from error
        if NAMES[self._provider] not in session.get_providers():
            raise start_failure(ort, self._provider, self.device)
        return session

    def _close(self) -> None:
        self._session = None

    def _infer(
        self, images: Pixels, feed: npt.NDArray[Any], outputs: list[str]
    ) -> Sequence[npt.NDArray[Any]]:
        name = self.signature.input_name
        try:
            if getattr(self._timing, "wanted", False):
                device = parse_device(self.device)
                result, self._timing.compute_ms = run_apart(
                    import_onnxruntime(), self._session, (name, feed), outputs, device
                )
            else:
                result = self._session.run(outputs, {name: feed})
        except ort_errors() as error:
            raise ImageShapeError(
                f"{self.path}: onnxruntime failed on images {list(images.shape)} "
                f"({first_line(error)})"
            ) from error
        return cast(Sequence[npt.NDArray[Any]], result)


class OnnxTensorRTRuntime(OnnxRuntime):
    """onnxruntime's TensorRT provider, which builds its engine at the first run of each image
    size."""

    backend = "onnxruntime-tensorrt"

    def __init__(self, artifact: Artifact, spec: Spec, options: RuntimeOptions) -> None:
        super().__init__(artifact, spec, options)
        self._provider = "tensorrt"


def import_onnxruntime() -> Any:
    """The package; it is optional. Raises MissingPackageError with the pip line.

    Its telemetry is off, unless the environment says otherwise: who runs a network is nobody's
    business, and it leaves files in the temporary and the home folder.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
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


# Execution providers


def require_offered(ort: Any, provider: Provider, device: str) -> None:
    """Raises UserError where the installed package was not built with `provider`."""
    offered = ort.get_available_providers()
    if NAMES[provider] not in offered:
        raise UserError(
            f"device {device} was asked for, but the installed onnxruntime offers only "
            f"{', '.join(offered)}: pip install onnxruntime-gpu in an environment without the "
            "CPU package, or use --device cpu"
        )


def provider_list(provider: Provider, index: int) -> list[Any]:
    """What a session is given, in the order of preference; `index` is the GPU's.

    What TensorRT leaves, such as casts of the input, is CUDA's; layers with weights are not, see
    require_provider.
    """
    # TF32 would be a silent loss of precision.
    cuda = (NAMES["cuda"], {"device_id": str(index), "use_tf32": "0"})
    # No flag for fp16 or int8: without them the graph's own types bind the builder. Engines kept
    # from other sessions could be another graph's.
    tensorrt = (NAMES["tensorrt"], {"device_id": str(index), "trt_engine_cache_enable": "0"})
    wanted: dict[Provider, list[Any]] = {"cpu": [], "cuda": [cuda], "tensorrt": [tensorrt, cuda]}
    return [*wanted[provider], NAMES["cpu"]]


def load_libraries(ort: Any, provider: Provider) -> None:
    """Loads what pip installed of CUDA, cuDNN and TensorRT, where the system's loader does not
    look. What is absent shows when the provider starts, and start_failure names it."""
    ort.set_default_logger_severity(4)  # else its log says the same in many lines
    # Its notes are prints; stdout is for results.
    with redirect_stdout(io.StringIO()), suppress(RuntimeError):
        ort.preload_dlls()
    if provider == "tensorrt":
        with suppress(ImportError):
            import tensorrt  # noqa: F401


def start_failure(ort: Any, provider: Provider, device: str) -> UserError:
    """Why `provider` did not start, as far as its library tells."""
    message = f"device {device} was asked for, but onnxruntime could not start {_CALLED[provider]}"
    library = Path(ort.__file__).parent / "capi" / _LIBRARIES[provider]
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        message += f" ({error})"
    return UserError(f"{message}: check {_NEEDS[provider]}, or use another --runtime or --device")


def require_provider(session: Any, provider: Provider, device: str) -> None:
    """Raises UserError unless `provider` computes every layer with weights.

    session: opened on `device` with session.record_ep_graph_assignment_info.
    """
    called = _CALLED[provider]
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
    stray = [one for one in placed if one[0] != NAMES[provider] and one[1] in LAYERS]
    if stray:
        elsewhere, kind, name = stray[0]
        raise UserError(
            f"device {device} was asked for, but {called} does not take {len(stray)} layers of "
            f"this graph, such as {kind} '{name}' (left to {elsewhere}): use another --runtime"
        )
    if all(one[0] != NAMES[provider] for one in placed):
        raise UserError(
            f"device {device} was asked for, but {called} takes no node of this graph: use "
            "another --runtime"
        )


def float32_of_tensorrt() -> str:
    """onnxruntime's TensorRT provider offers no way to forbid TF32 but this variable."""
    forbidden = os.environ.get("NVIDIA_TF32_OVERRIDE") == "0"
    return "float32" if forbidden else "float32 (TF32 allowed)"


# What onnxruntime's run takes on the device, apart from copying images there and results back.


def run_apart(
    ort: Any,
    session: Any,
    feed: tuple[str, npt.NDArray[Any]],
    outputs: Sequence[str],
    device: tuple[Literal["cpu", "cuda"], int],
) -> tuple[list[npt.NDArray[Any]], float]:
    """The named outputs for `feed` (input name, array), and milliseconds of only the run.

    Input and outputs are bound to the device's memory; the clock is the host's, from when the input
    lies there until the device is idle, so launching counts and copying does not.
    """
    name, array = feed
    binding = session.io_binding()
    binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, *device))
    for output in outputs:
        binding.bind_output(output, *device)
    binding.synchronize_inputs()
    start = time.perf_counter()
    session.run_with_iobinding(binding)
    binding.synchronize_outputs()
    took = 1000 * (time.perf_counter() - start)
    return binding.copy_outputs_to_cpu(), took


# Which types onnxruntime's own version of a graph computes in.


def layer_types(path: Path) -> set[str]:
    """Types that the convolutions and matrix products of an optimised graph compute in.

    path: what onnxruntime wrote as optimized_model_filepath. Its fused layers keep the name of what
    they were made of (FusedConv, NhwcConv, QLinearConv).
    """
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    types |= {value.name: value.type.tensor_type.elem_type for value in graph.input}
    found = set()
    for node in graph.node:  # topologically sorted
        types |= dict.fromkeys(node.output, _type_of_output(node, types))
        if node.op_type.startswith(_BY_INTEGERS):
            # QLinearAdd and the like are no layers with weights.
            if any(kind in node.op_type for kind in LAYERS):
                found.add("int8")
        elif node.op_type.endswith(LAYERS):
            found.add(_NAMES[onnx.TensorProto.DataType.Name(types[node.input[1]])])
    return found


def _type_of_output(node: "onnx.NodeProto", types: dict[str, int]) -> int:
    """onnxruntime writes no types of inner tensors. Right for whatever can lead to the second
    operand of a matrix product; other tensors do not matter."""
    if node.op_type == "Cast":
        return int(next(attribute.i for attribute in node.attribute if attribute.name == "to"))
    if node.op_type in ("DequantizeLinear", "Where"):
        return types[node.input[1]]  # the scale's; the chosen values'
    return types.get(node.input[0], 0) if node.input else 0
