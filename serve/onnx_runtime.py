"""onnxruntime behind the runtime contract, on the CPU, CUDA, or TensorRT through its provider."""

import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import local
from typing import Any, cast

import numpy.typing as npt

from srdeploy.errors import MissingPackageError, UserError
from srdeploy.imaging import Pixels
from srdeploy.serve.artifact import Artifact
from srdeploy.serve.graph_runtime import GraphRuntime, arithmetic
from srdeploy.serve.onnx_device_time import run_apart
from srdeploy.serve.onnx_providers import (
    NAMES,
    Provider,
    float32_of_tensorrt,
    load_libraries,
    provider_list,
    require_offered,
    require_provider,
    start_failure,
)
from srdeploy.serve.optimised_graph import layer_types
from srdeploy.serve.runtime import ImageShapeError, parse_device
from srdeploy.spec import Spec

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
        self._provider: Provider = "cpu"
        if parse_device(device)[0] == "cuda":
            self._provider = "tensorrt" if tensorrt else "cuda"
        self._threads = threads
        self._session: Any = None
        self._timing = local()

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
                raise UserError(
                    f"{file}: onnxruntime has no bfloat16 layers for CPUs ({first_line(error)}): "
                    "use --runtime openvino, or export with --precision fp16"
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
