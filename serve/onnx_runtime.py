"""onnxruntime behind the runtime contract, on the CPU or CUDA."""

import re
import warnings
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from srdeploy.errors import MissingPackageError, UserError
from srdeploy.imaging import Pixels, normalise
from srdeploy.serve.artifact import Artifact
from srdeploy.serve.runtime import ImageShapeError, Logits, Runtime, parse_device
from srdeploy.spec import Spec

_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"

_NODE_FAILED = re.compile(
    r".*while running (?P<kind>\S+) node\. Name:'(?P<name>.*?)' Status Message: (?P<why>.*)"
)


class OnnxRuntime(Runtime):
    """An ONNX graph in onnxruntime.

    onnxruntime computes the whole graph whichever outputs are asked for: what is left in the graph
    costs its time.
    """

    backend = "onnxruntime"

    def __init__(self, artifact: Artifact, spec: Spec, device: str, threads: int | None) -> None:
        assert artifact.signature is not None
        super().__init__(artifact, spec, device, artifact.signature.shape)
        self.signature = artifact.signature
        self.precision = artifact.signature.precision
        self._threads = threads
        self._session: Any = None

    def _open(self) -> None:
        ort = import_onnxruntime()
        kind, index = parse_device(self.device)
        options = ort.SessionOptions()
        options.log_severity_level = 4  # faults arrive as exceptions; the log would repeat them
        options.inter_op_num_threads = 1
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        # Idle workers must not burn the cores that decoding, encoding or another session needs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        providers: list[Any] = [_CPU]
        if kind == "cuda":
            self._require_cuda(ort)
            # TF32 would be a silent loss of precision.
            providers.insert(0, (_CUDA, {"device_id": str(index), "use_tf32": "0"}))
        file = str(self.artifact.file)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # its fall-back notes: checked below
                session = ort.InferenceSession(file, sess_options=options, providers=providers)
        except ort_errors() as error:
            raise UserError(f"{file}: onnxruntime can't load it ({first_line(error)})") from error
        if kind == "cuda" and _CUDA not in session.get_providers():
            raise UserError(
                f"device {self.device} was asked for, but onnxruntime could not start CUDA and "
                f"offers {', '.join(session.get_providers())}: check the driver and the CUDA "
                "libraries, or use --device cpu"
            )
        session.disable_fallback()
        self._session = session

    def _close(self) -> None:
        self._session = None

    def _labels(self, images: Pixels) -> Pixels:
        if self.signature.labels is None:
            return cast(Pixels, self._logits(images).argmax(1).astype(np.uint8))
        (labels,) = self._infer(images, [self.signature.labels])
        if labels.shape != images.shape[:3]:
            raise UserError(
                f"{self.path} gives labels {list(labels.shape)} for images {list(images.shape)}: "
                "labels of the images' own size are needed"
            )
        self._check_ids(labels)
        return cast(Pixels, labels.astype(np.uint8, copy=False))

    def _logits(self, images: Pixels) -> Logits:
        if self.signature.logits is None:
            raise UserError(
                f"{self.path} gives labels alone: export with --output logits or both to get logits"
            )
        (logits,) = self._infer(images, [self.signature.logits])
        if logits.ndim != 4 or logits.shape[1] != self.spec.class_count:
            raise UserError(
                f"{self.path} gives logits {list(logits.shape)}: its class list needs "
                f"[N, {self.spec.class_count}, H, W]"
            )
        return _upsample(logits.astype(np.float32, copy=False), images.shape[1], images.shape[2])

    def _infer(self, images: Pixels, outputs: list[str]) -> Sequence[Any]:
        feed = images if self.signature.input == "uint8" else normalise(images, self.spec)
        try:
            result = self._session.run(
                outputs, {self.signature.input_name: np.ascontiguousarray(feed)}
            )
        except ort_errors() as error:
            raise ImageShapeError(
                f"{self.path}: onnxruntime failed on images {list(images.shape)} "
                f"({first_line(error)})"
            ) from error
        return cast(Sequence[Any], result)

    def _check_ids(self, labels: npt.NDArray[np.integer[Any]]) -> None:
        """A cast to uint8 would turn a foreign graph's 256 into class 0."""
        count = self.spec.class_count
        if labels.min() >= 0 and labels.max() < count:
            return
        stray = labels[((labels < 0) | (labels >= count)) & (labels != self.spec.ignore_index)]
        if stray.size:
            raise UserError(
                f"{self.path} gives label {stray[0]}, but its class list has the ids "
                f"0..{count - 1}: give the list of the classes that it was trained with"
            )

    def _require_cuda(self, ort: Any) -> None:
        offered = ort.get_available_providers()
        if _CUDA not in offered:
            raise UserError(
                f"device {self.device} was asked for, but the installed onnxruntime offers only "
                f"{', '.join(offered)}: pip install 'srdeploy[gpu]' in an environment without the "
                "CPU package, or use --device cpu"
            )


def _upsample(logits: Logits, height: int, width: int) -> Logits:
    """Logits [N, K, h, w] at [N, K, height, width], bilinear with half-pixel centres.

    For foreign graphs: our own exports resize in the graph. Pillow's bilinear filter equals torch's
    half-pixel one where it enlarges, and only that is allowed.
    """
    count, classes, low_height, low_width = logits.shape
    if (low_height, low_width) == (height, width):
        return logits
    if low_height > height or low_width > width:
        raise UserError(
            f"the graph's logits are {low_height} x {low_width} for images of {height} x {width}: "
            "logits larger than the image are not understood"
        )
    enlarged = np.empty((count, classes, height, width), np.float32)
    for n in range(count):
        for k in range(classes):
            plane = Image.fromarray(np.ascontiguousarray(logits[n, k]))
            enlarged[n, k] = np.asarray(plane.resize((width, height), Image.Resampling.BILINEAR))
    return enlarged


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
