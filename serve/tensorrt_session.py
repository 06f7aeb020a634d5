"""An engine at work: its stream, its memory, and images going through."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from srdeploy.errors import UserError
from srdeploy.serve.cuda_array import DeviceArray, DeviceView, Stream
from srdeploy.serve.cuda_memory import DeviceBuffer, PinnedBuffer, array_bytes
from srdeploy.serve.cuda_runtime import Cuda
from srdeploy.serve.tensorrt_engine import Chunk, Engine, plan_chunks, require_profile
from srdeploy.serve.tensorrt_execution import Addresses, Execution, Graphs

PHASES = ("h2d_ms", "compute_ms", "d2h_ms")
"""Copying to the GPU, the engine, copying back."""

Mark = Callable[[str | None], None]
"""Called where a phase begins on the stream."""


class Session:
    """Takes arrays through an engine, one call at a time; callers from several threads queue."""

    def __init__(self, engine: Engine, cuda: Cuda, cuda_graph: bool, own_graphs: bool) -> None:
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
        self._graphs: Graphs | None = None
        if cuda_graph and not own_graphs:
            self._graphs = Graphs(engine, cuda, handle)

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
