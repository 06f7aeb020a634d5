"""Execution contexts: a shape, addresses, and work given to a stream."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from srdeploy.errors import UserError
from srdeploy.runtimes.base import ImageShapeError
from srdeploy.runtimes.trt.arrays import DeviceArray, DeviceView, Stream
from srdeploy.runtimes.trt.cuda_api import Cuda, DeviceBuffer, PinnedBuffer, array_bytes
from srdeploy.runtimes.trt.engine import Chunk, LoadedEngine, plan_chunks, require_profile

CAPTURED = 4
"""Shapes whose graphs are kept; each costs the memory of one execution context."""

Shape = tuple[int, ...]
Addresses = Mapping[str, int]
"""Name of an input or output -> where it lies on the GPU."""


class Execution:
    """One execution context of an engine, on one stream."""

    def __init__(
        self, engine: LoadedEngine, cuda: Cuda, stream: int, cuda_graph: bool = False
    ) -> None:
        """cuda_graph: TensorRT for RTX's own. Raises UserError as Engine.new_context."""
        self._engine = engine
        self._cuda = cuda
        self._stream = stream
        self._context: Any = engine.new_context(cuda_graph)
        self._prepared: tuple[int, Shape] | None = None
        self._addresses: dict[str, int] = {}

    def set_shape(self, profile: int, shape: Shape) -> dict[str, Shape]:
        """Prepares for an input of `shape`; returns the outputs' shapes by name.

        Raises UserError where TensorRT refuses the shape, or where an output's shape depends on
        the images' content.
        """
        self._engine.log.messages.clear()  # what earlier work left there explains nothing here
        context, name = self._context, self._engine.input.name
        is_active = context.active_optimization_profile == profile
        if not is_active and not context.set_optimization_profile_async(profile, self._stream):
            raise self._engine.failure(f"TensorRT does not take profile {profile}")
        if (profile, shape) != self._prepared:
            self._prepared = None
            if not context.set_input_shape(name, shape):
                raise ImageShapeError(
                    str(self._engine.failure(f"TensorRT does not take images {list(shape)}"))
                )
            self._prepared = profile, shape
        outputs = [one.name for one in self._engine.outputs]
        shapes = {output: tuple(context.get_tensor_shape(output)) for output in outputs}
        for output, found in shapes.items():
            if any(size < 0 for size in found):
                raise UserError(
                    f"{self._engine.path}: the shape of {output} depends on what is in the images, "
                    "which is not understood"
                )
        return shapes

    def enqueue(self, addresses: Addresses) -> None:
        """Gives one inference to the stream; set_shape comes before.

        Raises UserError where TensorRT refuses: an address is not aligned as it needs, or it has no
        memory for its work.
        """
        self._bind(addresses)
        self._execute()

    def free(self) -> None:
        """Frees the context."""
        self._context = None

    def _bind(self, addresses: Addresses) -> None:
        for name, address in addresses.items():
            if self._addresses.get(name) == address:
                continue
            self._addresses.pop(name, None)
            if not self._context.set_tensor_address(name, address):
                raise self._engine.failure(
                    f"TensorRT does not take the address of {name}, {address:#x}: give an array "
                    "of its own and no part of another"
                )
            self._addresses[name] = address

    def _execute(self) -> None:
        if not self._context.execute_async_v3(self._stream):
            raise self._engine.failure("TensorRT could not run it")


class GraphedExecution(Execution):
    """An execution for one shape that captures its work as a CUDA graph and launches that.

    A graph is bound to the state of its context, so this context serves no other shape.
    """

    def __init__(self, engine: LoadedEngine, cuda: Cuda, stream: int) -> None:
        super().__init__(engine, cuda, stream)
        self._graph: Any = None
        self._captured: dict[str, int] = {}

    def enqueue(self, addresses: Addresses) -> None:
        """As Execution. The first time, and where addresses moved since, it runs as usual and
        captures then: TensorRT does the work that a new shape asks for in the first run."""
        if self._graph is not None and addresses == self._captured:
            self._cuda.launch(self._graph, self._stream)
            return
        self._drop()
        super().enqueue(addresses)
        try:
            self._graph = self._cuda.capture(self._stream, self._execute)
        except UserError as error:
            raise UserError(
                f"{self._engine.path} can't be captured as a CUDA graph ({error}): leave "
                "cuda_graph away"
            ) from error
        self._captured = dict(addresses)

    def free(self) -> None:
        """Frees graph and context."""
        self._drop()
        super().free()

    def _drop(self) -> None:
        if self._graph is not None:
            graph, self._graph = self._graph, None
            self._cuda.free_graph(graph)


class CapturedGraphs:
    """The captured executions of the shapes used last."""

    def __init__(self, engine: LoadedEngine, cuda: Cuda, stream: int) -> None:
        self._made = (engine, cuda, stream)
        self._kept: OrderedDict[tuple[int, Shape], GraphedExecution] = OrderedDict()

    def of(self, profile: int, shape: Shape) -> GraphedExecution:
        """The execution for this shape. The stream must be idle: the oldest one may be freed."""
        key = (profile, shape)
        if key not in self._kept:
            while len(self._kept) >= CAPTURED:
                self._kept.popitem(last=False)[1].free()
            self._kept[key] = GraphedExecution(*self._made)
        self._kept.move_to_end(key)
        return self._kept[key]

    def free(self) -> None:
        """Frees all of them."""
        while self._kept:
            self._kept.popitem()[1].free()


# Engine sessions

PHASES = ("h2d_ms", "compute_ms", "d2h_ms")
"""Copying to the GPU, the engine, copying back."""

Mark = Callable[[str | None], None]
"""Called where a phase begins on the stream."""


class EngineSession:
    """Takes arrays through an engine, one call at a time; callers from several threads queue."""

    def __init__(
        self, engine: LoadedEngine, cuda: Cuda, cuda_graph: bool, own_graphs: bool
    ) -> None:
        """own_graphs: whether the engine's library captures graphs by itself.

        Raises UserError; nothing stays taken then. The GPU must be the calling thread's.
        """
        self._engine = engine
        self._cuda = cuda
        self._lock = Lock()
        self._inputs = (PinnedBuffer(cuda), DeviceBuffer(cuda))
        self._outputs = {
            one.name: (PinnedBuffer(cuda), DeviceBuffer(cuda)) for one in engine.outputs
        }
        self._dtypes = {one.name: one.dtype for one in engine.outputs}
        self._stream = Stream(cuda.new_stream())
        try:
            handle = self._stream.handle
            self._plain = Execution(engine, cuda, handle, cuda_graph and own_graphs)
        except BaseException:
            cuda.free_stream(self._stream.handle)
            raise
        self._graphs: CapturedGraphs | None = None
        if cuda_graph and not own_graphs:
            self._graphs = CapturedGraphs(engine, cuda, handle)

    @property
    def stream(self) -> int:
        """The handle of its stream."""
        return self._stream.handle

    def infer(
        self, feed: npt.NDArray[Any], outputs: Sequence[str], mark: Mark | None = None
    ) -> list[npt.NDArray[Any]]:
        """The named outputs for a contiguous array of the host, in parts where the engine's
        profiles need it. Raises UserError, ImageShapeError, CudaMemoryError."""
        shape = self._engine.image_shape(feed.shape)
        chunks = plan_chunks(self._engine.profiles, shape)
        results: dict[str, npt.NDArray[Any]] = {}
        with self._working():
            for chunk in chunks:
                parts = self._infer_chunk(feed, chunk, outputs, mark or _unmarked)
                for name, part in parts.items():
                    if name not in results:
                        whole = (shape[0], *part.shape[1:])
                        results[name] = np.empty(whole, part.dtype)
                    results[name][chunk.start : chunk.start + chunk.count] = part
        return [results[name] for name in outputs]

    def infer_device(
        self, images: DeviceView, source: object, output: str, stream: int | None
    ) -> DeviceArray:
        """The named output for an array on the GPU, whose memory is the engine's input itself.

        source: kept alive until the result is there. stream: what it holds so far comes before,
        what it gets afterwards comes after, instead of what the array says. Returns when the work
        was handed to the GPU. Raises as infer; no batch is split.
        """
        profile = require_profile(self._engine.profiles, self._engine.image_shape(images.shape))
        with self._working():
            shapes = self._plain.set_shape(profile, images.shape)
            # Outputs that were not asked for are computed as well, and lie in memory of our own.
            addresses = {
                name: self._outputs[name][1].fit(array_bytes(shape, self._dtypes[name]))
                for name, shape in shapes.items()
                if name != output
            }
            result = DeviceArray(
                self._cuda, self._stream, shapes[output], self._dtypes[output], source
            )
            addresses |= {self._engine.input.name: images.address, output: result.address}
            try:
                before = images.ready_on if stream is None else stream
                if before is not None:
                    self._cuda.order(before, self.stream)
                self._plain.enqueue(addresses)
                if stream is not None:
                    self._cuda.order(self.stream, stream)
            except BaseException:
                result.free()
                raise
        return result

    def close(self) -> None:
        """Waits for the stream, and frees everything but arrays that were returned."""
        with self._lock, self._cuda.on_device(freeing=True):
            self._cuda.drain(self.stream)
            self._stream.is_open = False
            if self._graphs is not None:
                self._graphs.free()
            self._plain.free()
            for pinned, device in (self._inputs, *self._outputs.values()):
                pinned.free()
                device.free()
            self._cuda.free_stream(self.stream)

    def _infer_chunk(
        self, feed: npt.NDArray[Any], chunk: Chunk, outputs: Sequence[str], mark: Mark
    ) -> dict[str, npt.NDArray[Any]]:
        """Views of pinned memory by output, valid until the next call."""
        part = feed[chunk.start : chunk.start + chunk.count]
        execution = self._execution(chunk.profile, part.shape)
        shapes = execution.set_shape(chunk.profile, part.shape)
        pinned, device = self._inputs
        staged = pinned.array(part.shape, part.dtype)
        addresses = {self._engine.input.name: device.fit(part.nbytes)} | {
            name: self._outputs[name][1].fit(array_bytes(shape, self._dtypes[name]))
            for name, shape in shapes.items()
        }
        results = {
            name: self._outputs[name][0].array(shapes[name], self._dtypes[name]) for name in outputs
        }
        np.copyto(staged, part)
        mark("h2d_ms")
        self._cuda.copy_to_device(device.address, pinned.address, part.nbytes, self.stream)
        mark("compute_ms")
        execution.enqueue(addresses)
        mark("d2h_ms")
        self._copy_back(results, addresses)
        mark(None)
        self._cuda.synchronize(self.stream)
        return results

    def _copy_back(self, results: dict[str, npt.NDArray[Any]], addresses: Addresses) -> None:
        for name, array in results.items():
            target = self._outputs[name][0].address
            self._cuda.copy_to_host(target, addresses[name], array.nbytes, self.stream)

    def _execution(self, profile: int, shape: tuple[int, ...]) -> Execution:
        return self._plain if self._graphs is None else self._graphs.of(profile, shape)

    @contextmanager
    def _working(self) -> Iterator[None]:
        """One caller at a time, on the GPU; after an error the stream is idle."""
        with self._lock, self._cuda.on_device():
            if not self._stream.is_open:
                raise UserError(f"{self._engine.path} was closed while it was in use")
            try:
                yield
            except BaseException:
                self._cuda.drain(self.stream)
                raise


def _unmarked(_: str | None) -> None:
    """Nobody asked for times."""
