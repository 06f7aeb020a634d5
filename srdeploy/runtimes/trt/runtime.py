"""TensorRT behind the runtime contract: engines of TensorRT 10 and 11, and of TensorRT for RTX."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import local
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from srdeploy.artifacts.artifact import Artifact, Builder, EngineSidecar, check_whole, read_sidecar
from srdeploy.errors import UserError
from srdeploy.imaging import Pixels
from srdeploy.runtimes.base import ImageShapeError, RuntimeOptions, parse_device
from srdeploy.runtimes.graph_runtime import GraphRuntime, arithmetic
from srdeploy.runtimes.trt.arrays import DeviceArray, read_interface, stream_handle
from srdeploy.runtimes.trt.compatibility import check_fits, engine_for, engine_host
from srdeploy.runtimes.trt.cuda_api import Cuda, CudaMemoryError, DeviceClock, import_cuda_runtime
from srdeploy.runtimes.trt.engine import import_tensorrt, load_engine
from srdeploy.runtimes.trt.session import PHASES, EngineSession
from srdeploy.spec import Spec


def _require_fit(sidecar: EngineSidecar, index: int) -> None:
    check_fits(sidecar, engine_host(sidecar.builder, index))


@dataclass(frozen=True)
class TensorRTLibraries:
    """Where the runtime takes what is not Python's own from."""

    tensorrt: Callable[[Builder], Any] = import_tensorrt
    cuda: Callable[[Builder], Any] = import_cuda_runtime
    """The module of CUDA's runtime API."""
    check_fit: Callable[[EngineSidecar, int], None] = _require_fit
    """Raises UserError where the engine does not run on the GPU cuda:N."""


class TensorRTRuntime(GraphRuntime):
    """An engine with its sidecar.

    Images of the host go through pinned memory. A batch larger than the engine's profiles take runs
    in parts of nearly equal size, one after the other. cuda_graph: the engine's work is captured as
    a CUDA graph for each of the last few shapes and launched at once, which saves the CPU's time
    where the network is small; the first run of a shape takes longer.
    """

    backend = "tensorrt"

    def __init__(
        self,
        artifact: Artifact,
        spec: Spec,
        options: RuntimeOptions,
        *,
        cuda_graph: bool = False,
        libraries: TensorRTLibraries = TensorRTLibraries(),
    ) -> None:
        super().__init__(artifact, spec, options.device)
        self.sidecar = read_sidecar(artifact.file)
        self.precision = _arithmetic(self.sidecar)
        self._cuda_graph = cuda_graph
        self._libraries = libraries
        self._cuda: Cuda | None = None
        self._session: EngineSession | None = None
        self._timing = local()

    @classmethod
    def pick_file(cls, artifact: Artifact, device: str) -> Artifact:
        """The engine of a deploy folder for this GPU. Raises UserError where there is none."""
        return engine_for(artifact, parse_device(device)[1])

    @classmethod
    def import_library(cls, builder: Builder | None = None) -> Any:
        """TensorRT's package and CUDA's. Raises MissingPackageError."""
        builder = builder or "tensorrt"
        import_cuda_runtime(builder)
        return import_tensorrt(builder)

    def run_device(
        self,
        images: object,
        stream: object = None,
        output: Literal["labels", "logits"] = "labels",
    ) -> DeviceArray:
        """Images on the GPU -> the output on the GPU, without copies and without waiting.

        images: anything with __cuda_array_interface__ (pycuda's GPUArray, CuPy, torch), contiguous,
        in the graph's own form: uint8 [N, H, W, 3], or float32 [N, 3, H, W] for a graph whose
        client normalises. At most as many as a profile takes: no batch is split. Returns the
        output as the engine gives it, mostly uint8 [N, H, W].

        stream: a handle or a stream of torch, CuPy or pycuda. The images are ready after what it
        holds so far, and what it is given later finds the output ready. Without it, the images'
        own interface says which stream to wait for, and the output's says which one its consumer
        waits for. torch tells no stream of its own there, so give it its current one where that
        is not the default stream.

        Raises UserError, and ImageShapeError where no profile takes the shape. CUDA graphs are not
        used here, since the addresses are the caller's.
        """
        session = self._opened()
        view = read_interface(images)
        self._check_form(view.shape, view.dtype)
        name = self.signature.labels if output == "labels" else self.signature.logits
        if name is None:
            raise UserError(f"{self.path} gives no {output}: export with --output both to get them")
        handle = None if stream is None else stream_handle(stream)
        assert self._cuda is not None
        with self._cuda.on_device():
            owner = self._cuda.memory_device(view.address)
        if owner != parse_device(self.device)[1]:
            where = "the host's memory" if owner is None else f"cuda:{owner}"
            raise UserError(f"the images are in {where} and the engine on {self.device}: copy them")
        try:
            return session.infer_device(view, images, name, handle)
        except CudaMemoryError as error:
            raise self._too_large(view.shape, error) from error

    def timed_run(self, images: Pixels) -> tuple[Pixels, dict[str, float]]:
        """run, and the device's milliseconds: {"h2d_ms", "compute_ms", "d2h_ms"}.

        Parts of a split batch are added up. The host's own work (normalising, copying to pinned
        memory, waiting for a free core) is in none of them.
        """
        session = self._opened()
        assert self._cuda is not None
        with self._cuda.on_device(), DeviceClock(self._cuda, session.stream) as clock:
            self._timing.mark = clock.mark
            try:
                labels = self.run(images)
            finally:
                del self._timing.mark
            return labels, clock.read(PHASES)

    def _open(self) -> None:
        sidecar, index = self.sidecar, parse_device(self.device)[1]
        trt = self._libraries.tensorrt(sidecar.builder)
        cuda = Cuda(self._libraries.cuda(sidecar.builder), index)
        self._libraries.check_fit(sidecar, index)
        check_whole(self.artifact.file, sidecar)
        with cuda.on_device():
            engine = load_engine(trt, self.artifact.file, sidecar)
            # TensorRT for RTX compiles kernels while it runs, and only it knows when to capture.
            self._session = EngineSession(
                engine, cuda, self._cuda_graph, own_graphs=sidecar.builder == "rtx"
            )
        self._cuda = cuda

    def _close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()
        self._cuda = None

    def _infer(
        self, images: Pixels, feed: npt.NDArray[Any], outputs: list[str]
    ) -> Sequence[npt.NDArray[Any]]:
        try:
            mark = getattr(self._timing, "mark", None)
            return self._opened().infer(feed, outputs, mark)
        except CudaMemoryError as error:
            raise self._too_large(images.shape, error) from error

    def _opened(self) -> EngineSession:
        if self._session is None:
            raise UserError(f"the runtime of {self.path} is not open: use it in a with block")
        return self._session

    def _too_large(self, shape: tuple[int, ...], error: CudaMemoryError) -> ImageShapeError:
        return ImageShapeError(f"{self.path} with images {list(shape)}: {error}")

    def _check_form(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Raises ImageShapeError where an array is not of the graph's own form and least size."""
        planes = self.signature.input == "float32"
        fits = dtype == np.dtype(self.signature.input) and len(shape) == 4
        if not fits or shape[1 if planes else 3] != 3 or shape[0] < 1:
            form = "float32 [N, 3, H, W]" if planes else "uint8 [N, H, W, 3]"
            raise ImageShapeError(f"images are {dtype} {list(shape)}: {form} is needed")
        n, height, width = (shape[0], *shape[2:]) if planes else shape[:3]
        # The contract's own check reads only type and shape: this array has no memory.
        self._check(np.broadcast_to(np.uint8(0), (n, height, width, 3)))


def _arithmetic(sidecar: EngineSidecar) -> str:
    text = arithmetic(sidecar.layer_types, sidecar.signature.precision)
    tells = sidecar.precision != "tf32" or "tf32" in sidecar.layer_types
    return text if tells else f"{text} (TF32 allowed)"
