"""The runtime contract: photos in, labels out, the same on every backend.

    with open_runtime("deploy/night", device="cpu") as runtime:
        labels = runtime.run(images)        # uint8 [N, H, W, 3] RGB -> uint8 [N, H, W]

What a runtime is (spec, device, precision, input shape) is known at once; it must be open to run.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, cast

import numpy as np
import numpy.typing as npt

from srdeploy.errors import UserError
from srdeploy.imaging import Pixels
from srdeploy.serve.artifact import Artifact, open_artifact
from srdeploy.serve.signature import Shape, check_class_count, spec_for_graph
from srdeploy.spec import Spec
from srdeploy.validation import closest

Logits = npt.NDArray[np.float32]

RUNTIMES = ("auto", "torch", "onnxruntime", "onnxruntime-tensorrt", "openvino", "tensorrt")
"""auto: torch for a run, onnxruntime for a graph, tensorrt for an engine."""


class ImageShapeError(UserError):
    """Images that this runtime can't take, for shape or size; the message has the actual shape."""


class Runtime(ABC):
    """One network, ready to run on one device. A context manager: open it before use."""

    backend: str
    """Which library runs it: one of RUNTIMES but auto."""
    precision: str
    """Of the arithmetic, as it really is once the runtime is open; until then, of what is stored.
    Several are joined with +, and stored types that differ are added: "float32 (stored as
    float16)"."""

    def __init__(self, artifact: Artifact, spec: Spec, device: str, input_shape: Shape) -> None:
        self.artifact = artifact
        self.path = artifact.path
        self.spec = spec
        self.device = device
        self.input_shape = input_shape
        self._is_open = False

    def __enter__(self) -> Self:
        self._open()
        self._is_open = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_open = False
        self._close()

    def run(self, images: Pixels) -> Pixels:
        """images uint8 [N, H, W, 3] RGB -> labels uint8 [N, H, W].

        Raises ImageShapeError (a UserError) where the graph can't take them.
        """
        self._check(images)
        return self._labels(images)

    def timed_run(self, images: Pixels) -> tuple[Pixels, dict[str, float] | None]:
        """run, and the device's own time of it in milliseconds by phase, "compute_ms" among them.

        None where the device's time can't be told from the host's. Raises as run.
        """
        return self.run(images), None

    def logits(self, images: Pixels) -> Logits:
        """images uint8 [N, H, W, 3] RGB -> logits float32 [N, K, H, W].

        Raises UserError where the graph gives labels alone, or can't take the images.
        """
        self._check(images)
        return self._logits(images)

    @property
    def gives_logits(self) -> bool:
        """Whether `logits` works."""
        return True

    def __str__(self) -> str:
        return f"{self.path} ({self.backend}, {self.device}, {self.precision})"

    @abstractmethod
    def _open(self) -> None:
        """Loads the network onto the device."""

    @abstractmethod
    def _close(self) -> None:
        """Frees what _open took."""

    @abstractmethod
    def _labels(self, images: Pixels) -> Pixels:
        """run, on checked images."""

    @abstractmethod
    def _logits(self, images: Pixels) -> Logits:
        """logits, on checked images."""

    def _check(self, images: Pixels) -> None:
        if not self._is_open:
            raise UserError(f"the runtime of {self.path} is not open: use it in a with block")
        shape = tuple(images.shape)
        if images.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or shape[0] < 1:
            raise ImageShapeError(
                f"images are {images.dtype} {list(shape)}: uint8 [N, H, W, 3] is needed"
            )
        for name, actual, wanted in zip("NHW", shape[:3], self.input_shape[:3], strict=True):
            if wanted is not None and actual != wanted:
                raise ImageShapeError(
                    f"{self.path} takes images of {_shape_text(self.input_shape)} alone, "
                    f"not {list(shape)} ({name} is {actual})"
                )
        least = self.spec.input.smallest
        if shape[1] < least[0] or shape[2] < least[1]:
            raise ImageShapeError(
                f"images are {list(shape)}: {self.path} needs at least {least[0]} x {least[1]} "
                "(height x width)"
            )


def open_runtime(
    path: Path | str,
    device: str = "cpu",
    runtime: str = "auto",
    spec: Spec | None = None,
    threads: int | None = None,
    precision: str | None = None,
) -> Runtime:
    """The runtime for a run folder, a deploy folder, an .onnx or an .engine file.

    It is not open yet. device: cpu, cuda or cuda:N. runtime: one of RUNTIMES. spec: for ONNX files
    that carry none. threads: CPU threads [all cores]. precision: of OpenVINO's arithmetic, fp32
    [default], bf16 or fp16; elsewhere the artifact's types decide. Raises UserError where artifact,
    runtime, device or their combination can't be used; nothing falls back to something else.
    """
    artifact = open_artifact(Path(path))
    name = choose_runtime(artifact, runtime)
    _require_device(name, device, threads)
    if precision is not None and name != "openvino":
        raise UserError(
            f"--precision {precision}: {name} computes what the types in {path} say; OpenVINO "
            "alone has a choice (--runtime openvino), elsewhere export with --precision"
        )
    if name == "tensorrt":
        from srdeploy.serve.engine_choice import engine_for

        artifact = engine_for(artifact, parse_device(device)[1])
        from srdeploy.serve.tensorrt_runtime import TensorRTRuntime

        return TensorRTRuntime(artifact, _resolve_spec(artifact, spec), device)
    own = _resolve_spec(artifact, spec)
    if name == "torch":
        from srdeploy.serve.torch_runtime import TorchRuntime

        return TorchRuntime(artifact, own, device, threads)
    if name == "openvino":
        from srdeploy.serve.openvino_runtime import OpenVINORuntime

        return OpenVINORuntime(artifact, own, device, threads, precision)
    from srdeploy.serve.onnx_runtime import OnnxRuntime

    return OnnxRuntime(artifact, own, device, threads, tensorrt=name == "onnxruntime-tensorrt")


def choose_runtime(artifact: Artifact, runtime: str) -> str:
    """The runtime, auto resolved. Raises UserError where it can't run such an artifact."""
    if runtime not in RUNTIMES:
        raise UserError(f"unknown runtime '{runtime}': {closest(runtime, RUNTIMES)}")
    path, kind = artifact.path, artifact.kind
    if runtime == "auto":
        return {"run": "torch", "engine": "tensorrt"}.get(kind, "onnxruntime")
    if kind == "run" and runtime != "torch":
        engine = " --trt" if runtime == "tensorrt" else ""
        raise UserError(
            f"{path} is a run folder, which torch runs: for {runtime}, export it first "
            f"(srdeploy export {path}{engine})"
        )
    if kind == "engine" and runtime != "tensorrt":
        raise UserError(
            f"{path} is a TensorRT engine, which tensorrt runs: for {runtime}, give the "
            f"{'run folder' if runtime == 'torch' else 'graph that it was built from'}"
        )
    if kind in ("deploy", "onnx") and runtime == "torch":
        raise UserError(
            f"{path} holds an ONNX graph, which onnxruntime runs: for torch, give the run folder"
        )
    if kind == "onnx" and runtime == "tensorrt":
        raise UserError(
            f"{path} is a graph and not an engine: build one (srdeploy export RUN --trt), or use "
            "--runtime onnxruntime-tensorrt"
        )
    return runtime


def _require_device(runtime: str, device: str, threads: int | None) -> None:
    """Raises UserError where `runtime` does not run on `device`."""
    kind, _ = parse_device(device)
    if kind == "cpu" and runtime in ("tensorrt", "onnxruntime-tensorrt"):
        raise UserError(f"{runtime} runs on an NVIDIA GPU: use --device cuda")
    if kind == "cuda" and runtime == "openvino":
        raise UserError(
            f"openvino runs on the CPU here, not on {device}: use --device cpu, or --runtime "
            "onnxruntime or tensorrt for the GPU"
        )
    if threads is not None and runtime == "tensorrt":
        raise UserError("--threads sets threads of the CPU, and a TensorRT engine uses none")


def parse_device(device: str) -> tuple[Literal["cpu", "cuda"], int]:
    """("cpu", 0) or ("cuda", N). Raises UserError for anything else."""
    kind, _, index = device.partition(":")
    if kind in ("cpu", "cuda") and (index.isdecimal() or device == kind) and device != "cpu:":
        if kind == "cpu" and index not in ("", "0"):
            raise UserError(f"unknown device '{device}': the CPU is one device, cpu")
        return cast(Literal["cpu", "cuda"], kind), int(index or 0)
    raise UserError(f"unknown device '{device}': cpu, cuda or cuda:N")


def _resolve_spec(artifact: Artifact, given: Spec | None) -> Spec:
    own = artifact.spec
    if given is None:
        if own is None:
            raise UserError(
                f"{artifact.path} carries no srdeploy metadata (key 'srdeploy.spec'): "
                "say what its classes are with --classes classes.json"
            )
        return own
    if own is not None and own != given:
        raise UserError(
            f"{artifact.path} has its own classes and pre-processing, and others were given: "
            "leave --classes away"
        )
    if artifact.signature is not None:
        check_class_count(artifact.signature.classes, given, artifact.path)
        if own is None:
            return spec_for_graph(given, artifact.signature)
    return given


def _shape_text(shape: Shape) -> str:
    names = ("N", "H", "W", "3")
    return "[" + ", ".join(str(s or n) for s, n in zip(shape, names, strict=True)) + "]"
