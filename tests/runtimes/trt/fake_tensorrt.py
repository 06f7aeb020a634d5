"""TensorRT's Python API on a FakeCuda: an engine that knows one network, computed with numpy.

The network is the colour graph of conftest: the label is the strongest of green, red and blue, and
they are the logits. It keeps TensorRT's rules and refuses as TensorRT does, by False and a line in
the log.
"""

import ctypes
import json
from enum import Enum, IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.runtimes.trt.fake_cuda import ALIGNMENT, GARBAGE, FakeCuda

Shape = tuple[int, ...]


class TensorIOMode(Enum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class TensorLocation(Enum):
    DEVICE = 0
    HOST = 1


class DataType(Enum):
    FLOAT = 0
    HALF = 1
    INT8 = 2
    INT32 = 3
    BOOL = 4
    UINT8 = 5
    INT64 = 8
    BF16 = 7


class CudaGraphStrategy(Enum):
    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


class Severity(IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3


NUMPY = {"UINT8": np.uint8, "INT32": np.int32, "FLOAT": np.float32, "HALF": np.float16}


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO = Severity

    def __init__(self) -> None:
        self.is_ready = True


class FakeTensorRT:
    """The package. What it made is in `contexts`."""

    __version__ = "11.4.0.106"
    ILogger = ILogger
    TensorIOMode = TensorIOMode
    TensorLocation = TensorLocation
    CudaGraphStrategy = CudaGraphStrategy

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.contexts: list[Context] = []
        self.without_memory = False

    def Runtime(self, logger: Any) -> "Runtime":
        assert logger.is_ready
        return Runtime(self, logger)


class Runtime:
    def __init__(self, trt: FakeTensorRT, logger: Any) -> None:
        self.trt = trt
        self.logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> "Engine | None":
        self.logger.log(Severity.INFO, "Loaded engine size: 0 MiB")
        if not serialized_engine.startswith(b"{"):
            self.logger.log(Severity.ERROR, "magicTag  failed,\n another version")
            self.logger.log(Severity.ERROR, "cudaError 35")
            return None
        return Engine(self.trt, self.logger, json.loads(serialized_engine))


def write_plan(
    profiles: list[list[list[int]]],
    input: tuple[str, str] = ("images", "UINT8"),
    outputs: dict[str, str] | None = None,
    fixed: list[int] | None = None,
    location: str = "DEVICE",
) -> bytes:
    """The engine's file. profiles: [smallest, usual, largest] input shapes; fixed: the one shape
    of an engine without profiles."""
    outputs = {"labels": "UINT8"} if outputs is None else outputs
    plan = {"profiles": profiles, "input": input, "outputs": outputs, "fixed": fixed}
    return json.dumps(plan | {"location": location}).encode()


class Engine:
    def __init__(self, trt: FakeTensorRT, logger: Any, plan: dict[str, Any]) -> None:
        self.trt = trt
        self.logger = logger
        self.plan = plan
        self.types = dict([plan["input"]]) | plan["outputs"]
        self.num_io_tensors = len(self.types)
        self.num_optimization_profiles = len(plan["profiles"])

    def get_tensor_name(self, index: int) -> str:
        return str(list(self.types)[index])

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name == self.plan["input"][0] else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[self.types[name]]

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation[self.plan["location"]]

    def get_tensor_shape(self, name: str) -> list[int]:
        assert self.get_tensor_mode(name) is TensorIOMode.INPUT
        return list(self.plan["fixed"] or [-1, -1, -1, 3])

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        assert self.plan["fixed"] is None
        return list(self.plan["profiles"][profile_index])

    def create_runtime_config(self) -> SimpleNamespace:
        return SimpleNamespace(cuda_graph_strategy=CudaGraphStrategy.DISABLED)

    def create_execution_context(
        self, runtime_config: SimpleNamespace | None = None
    ) -> "Context | None":
        if self.trt.without_memory:
            self.logger.log(Severity.ERROR, "OutOfMemory (requested 7 bytes)")
            return None
        context = Context(self, runtime_config)
        self.trt.contexts.append(context)
        return context


class Context:
    def __init__(self, engine: Engine, config: SimpleNamespace | None) -> None:
        self.engine = engine
        self.config = config
        # The first context of an engine has a profile, others must choose one.
        self.active_optimization_profile = 0 if not engine.trt.contexts else -1
        self.shape: Shape | None = None
        self.addresses: dict[str, int] = {}
        self.deferred = True
        """Whether the next run does work that a new shape asks for."""
        self.changes = 0
        self.runs = 0
        self.refuses_to_run = False

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert stream_handle in self.engine.trt.cuda.streams
        self.active_optimization_profile = profile_index
        self.shape = None
        self.changes += 1
        return True

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        assert self.active_optimization_profile >= 0
        plan = self.engine.plan
        if plan["fixed"] is None:
            low, _, high = plan["profiles"][self.active_optimization_profile]
        else:
            low = high = plan["fixed"]
        if not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            return self._refuse(f"setInputShape: {list(shape)} is out of range")
        self.shape = tuple(shape)
        self.deferred = True
        self.changes += 1
        return True

    def get_tensor_shape(self, name: str) -> list[int]:
        assert self.shape is not None
        n, height, width = self._image_shape()
        if name in ("labels", "nowhere"):
            return [n, height, width if name == "labels" else -1]
        return [n, 3, height, width]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert isinstance(memory, int)
        if memory % ALIGNMENT:
            return self._refuse(f"setTensorAddress: data must be aligned on {ALIGNMENT} bytes")
        if self.addresses.get(name) != memory:
            self.addresses[name] = memory
            self.changes += 1
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        stream = self.engine.trt.cuda.streams[stream_handle]
        capturing = stream.captured is not None
        if self.refuses_to_run or set(self.addresses) != set(self.engine.types):
            return self._refuse("enqueueV3: Error Code 3")
        if capturing and self.deferred:
            return self._refuse("enqueueV3: can't be captured right after a new shape")
        self.deferred = False
        addresses, changes = dict(self.addresses), self.changes
        shapes = {name: tuple(self.get_tensor_shape(name)) for name in self.engine.plan["outputs"]}
        shapes[self.engine.plan["input"][0]] = self.shape or ()

        def compute() -> None:
            self.runs += 1
            self.engine.trt.cuda.tick(2.0)
            # A graph whose context has changed since computes anything.
            self._compute(addresses, shapes, spoilt=capturing and changes != self.changes)

        stream.add(compute)
        return True

    def _compute(self, addresses: dict[str, int], shapes: dict[str, Shape], spoilt: bool) -> None:
        cuda, types = self.engine.trt.cuda, self.engine.types
        name, kind = self.engine.plan["input"]
        images = cuda.read(addresses[name], shapes[name], NUMPY[kind])
        planes = images.transpose(0, 3, 1, 2) if kind == "UINT8" else images
        logits = planes[:, [1, 0, 2]].astype(np.float32)
        for output in self.engine.plan["outputs"]:
            value = logits if output == "logits" else logits.argmax(1)
            value = np.full_like(value, GARBAGE) if spoilt else value
            typed = np.ascontiguousarray(value.astype(NUMPY[types[output]]))
            assert typed.nbytes <= cuda.memory[addresses[output]][1]
            ctypes.memmove(addresses[output], typed.ctypes.data, typed.nbytes)

    def _image_shape(self) -> Shape:
        assert self.shape is not None
        if self.engine.plan["input"][1] == "UINT8":
            return self.shape[:3]
        return (self.shape[0], *self.shape[2:])

    def _refuse(self, why: str) -> bool:
        self.engine.logger.log(Severity.ERROR, f"IExecutionContext::{why}")
        return False
