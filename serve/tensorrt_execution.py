"""Execution contexts: a shape, addresses, and work given to a stream."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from srdeploy.errors import UserError
from srdeploy.serve.cuda_runtime import Cuda
from srdeploy.serve.runtime import ImageShapeError
from srdeploy.serve.tensorrt_engine import Engine

CAPTURED = 4
"""Shapes whose graphs are kept; each costs the memory of one execution context."""

Shape = tuple[int, ...]
Addresses = Mapping[str, int]
"""Name of an input or output -> where it lies on the GPU."""


class Execution:
    """One execution context of an engine, on one stream."""

    def __init__(self, engine: Engine, cuda: Cuda, stream: int, cuda_graph: bool = False) -> None:
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

    def __init__(self, engine: Engine, cuda: Cuda, stream: int) -> None:
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


class Graphs:
    """The captured executions of the shapes used last."""

    def __init__(self, engine: Engine, cuda: Cuda, stream: int) -> None:
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
