"""TensorRT's Python package, proper or for RTX: both offer one API."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from srdeploy.artifacts.artifact import Builder, EngineSidecar, Profile
from srdeploy.errors import MissingPackageError, UserError
from srdeploy.files import explain_os_error
from srdeploy.runtimes.base import ImageShapeError


def import_tensorrt(builder: Builder) -> Any:
    """The package. Raises MissingPackageError with the pip line."""
    try:
        if builder == "rtx":
            import tensorrt_rtx

            return tensorrt_rtx
        import tensorrt
    except ImportError as error:
        name = "tensorrt_rtx" if builder == "rtx" else "tensorrt"
        raise MissingPackageError(name, builder, "building and running TensorRT engines") from error
    return tensorrt


@dataclass(frozen=True)
class LogMessage:
    """One line of TensorRT's log."""

    error: bool
    warning: bool
    text: str


def collecting_logger(trt: Any) -> Any:
    """A logger for TensorRT with a list `messages` of the errors and warnings; prints nothing."""

    class Collector(trt.ILogger):  # type: ignore[misc]  # the base is known only at run time
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[LogMessage] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity <= trt.ILogger.WARNING:
                error = severity <= trt.ILogger.ERROR
                self.messages.append(LogMessage(error=error, warning=not error, text=msg))

    return Collector()


# A TensorRT engine, loaded and compared with its sidecar: what it takes, gives and has profiles
# for.

_TYPES = {
    "UINT8": np.uint8,
    "INT8": np.int8,
    "INT32": np.int32,
    "INT64": np.int64,
    "HALF": np.float16,
    "FLOAT": np.float32,
}
"""TensorRT's names of the types that a signature allows for input and outputs."""
_LONGEST = 300
"""Characters of a line of TensorRT's log that are shown."""


@dataclass(frozen=True)
class EngineTensor:
    """An input or output."""

    name: str
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class LoadedEngine:
    """A deserialised engine. TensorRT's objects are freed with the last reference."""

    path: Path
    trt: Any
    """The package that it belongs to."""
    plan: Any
    """The ICudaEngine."""
    log: Any
    """The logger; its list `errors` has what TensorRT said went wrong."""
    input: EngineTensor
    outputs: tuple[EngineTensor, ...]
    profiles: tuple[Profile, ...]
    planes_first: bool
    """Whether the input is [N, 3, H, W] rather than [N, H, W, 3]."""

    def new_context(self, cuda_graph: bool = False) -> Any:
        """An IExecutionContext with memory of its own. cuda_graph: whether the engine captures and
        launches graphs by itself (only TensorRT for RTX can).

        Raises UserError where TensorRT can't make one, usually for want of memory.
        """
        if cuda_graph:
            config = self.plan.create_runtime_config()
            config.cuda_graph_strategy = self.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = self.plan.create_execution_context(config)
        else:
            context = self.plan.create_execution_context()
        if context is None:
            raise self.failure("TensorRT can't make an execution context, which takes GPU memory")
        return context

    def failure(self, what: str) -> UserError:
        """An error that says `what` failed, and why in TensorRT's words."""
        return UserError(f"{self.path}: {what} ({last_words(self.log)})")

    def image_shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """(N, H, W) of an input's shape."""
        n, *rest = shape
        return (n, rest[1], rest[2]) if self.planes_first else (n, rest[0], rest[1])


def load_engine(trt: Any, path: Path, sidecar: EngineSidecar) -> LoadedEngine:
    """Deserialises the engine onto the current GPU.

    Raises UserError with the command that rebuilds it where TensorRT refuses it, or where it takes
    and gives something else than its sidecar says.
    """
    log = collecting_logger(trt)
    try:
        serialised = path.read_bytes()
    except OSError as error:
        raise explain_os_error(error, path) from error
    plan = trt.Runtime(log).deserialize_cuda_engine(serialised)
    if plan is None:
        raise UserError(
            f"{path}: TensorRT {trt.__version__} can't load it ({last_words(log)}). "
            f"Build it again: {sidecar.command}"
        )
    tensors = [plan.get_tensor_name(index) for index in range(plan.num_io_tensors)]
    inputs = [name for name in tensors if plan.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    outputs = [name for name in tensors if name not in inputs]
    _check_signature(trt, plan, inputs, outputs, path, sidecar)
    planes_first = sidecar.signature.input == "float32"
    return LoadedEngine(
        path=path,
        trt=trt,
        plan=plan,
        log=log,
        input=_tensor(plan, inputs[0]),
        outputs=tuple(_tensor(plan, name) for name in outputs),
        profiles=_read_profiles(plan, inputs[0], planes_first),
        planes_first=planes_first,
    )


def last_words(log: Any) -> str:
    """What TensorRT said, and forgets it: the first error, which later ones follow from."""
    errors = [message.text for message in log.messages if message.error]
    text = " ".join(errors[0].split()) if errors else "it gives no reason"
    log.messages.clear()
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


@dataclass(frozen=True)
class Chunk:
    """A part of a batch that runs at once."""

    profile: int
    """Index of the optimisation profile."""
    start: int
    """Index of the first image."""
    count: int


def plan_chunks(profiles: Sequence[Profile], shape: tuple[int, int, int]) -> tuple[Chunk, ...]:
    """How images (N, H, W) run: at once where a profile takes them, else in parts of nearly equal
    size, as few as can be.

    Raises ImageShapeError where no profile takes images of that size, or no part of that batch.
    """
    n, height, width = shape
    largest = max(
        (one.largest[0] for one in profiles if _takes(one, (one.largest[0], height, width))),
        default=None,
    )
    if largest is None:
        raise ImageShapeError(_refusal(profiles, shape))
    for parts in range(-(-n // largest), n + 1):
        chunks, start = [], 0
        for part in range(parts):
            count = n // parts + (part < n % parts)
            profile = choose_profile(profiles, (count, height, width))
            if profile is None:
                break
            chunks.append(Chunk(profile, start, count))
            start += count
        if start == n:
            return tuple(chunks)
    raise ImageShapeError(_refusal(profiles, shape))


def require_profile(profiles: Sequence[Profile], shape: tuple[int, int, int]) -> int:
    """The profile that takes (N, H, W) at once. Raises ImageShapeError where none does."""
    profile = choose_profile(profiles, shape)
    if profile is None:
        raise ImageShapeError(_refusal(profiles, shape))
    return profile


def choose_profile(profiles: Sequence[Profile], shape: tuple[int, int, int]) -> int | None:
    """The index of a profile that takes (N, H, W): of several, the one tuned for the shape that is
    nearest to it, by the ratios of the dimensions. None where none does."""

    def distance(index: int) -> float:
        ratios = np.divide(shape, profiles[index].usual)
        return float(np.abs(np.log(ratios)).sum())

    fitting = [index for index, one in enumerate(profiles) if _takes(one, shape)]
    return min(fitting, key=distance, default=None)


def _takes(profile: Profile, shape: tuple[int, int, int]) -> bool:
    bounds = zip(profile.smallest, shape, profile.largest, strict=True)
    return all(low <= actual <= high for low, actual, high in bounds)


def _refusal(profiles: Sequence[Profile], shape: tuple[int, int, int]) -> str:
    ranges = "; ".join(
        ", ".join(
            f"{name} {low}" if low == high else f"{name} {low} to {high}"
            for name, low, high in zip("NHW", one.smallest, one.largest, strict=True)
        )
        for one in profiles
    )
    n, height, width = shape
    return (
        f"images are [{n}, {height}, {width}, 3], and the engine was built for {ranges}: resize "
        "them, or build it with a profile that covers them"
    )


def _check_signature(
    trt: Any, plan: Any, inputs: list[str], outputs: list[str], path: Path, sidecar: EngineSidecar
) -> None:
    """Raises UserError where the engine is another one than the sidecar describes."""
    signature = sidecar.signature
    faults = []
    if inputs != [signature.input_name]:
        faults.append(f"its inputs are {', '.join(inputs)} and not {signature.input_name}")
    else:
        wanted = "UINT8" if signature.input == "uint8" else "FLOAT"
        if plan.get_tensor_dtype(inputs[0]).name != wanted:
            faults.append(f"{inputs[0]} is {plan.get_tensor_dtype(inputs[0]).name}, not {wanted}")
    for name, kinds in ((signature.labels, "ui"), (signature.logits, "f")):
        if name is None:
            continue
        if name not in outputs:
            faults.append(f"it has no output {name} but {', '.join(outputs)}")
            continue
        dtype = _TYPES.get(plan.get_tensor_dtype(name).name)
        if dtype is None or np.dtype(dtype).kind not in kinds:
            faults.append(f"{name} is {plan.get_tensor_dtype(name).name}")
    for name in (*inputs, *outputs):
        if plan.get_tensor_dtype(name).name not in _TYPES:
            faults.append(f"{name} is {plan.get_tensor_dtype(name).name}, which is not understood")
        if plan.get_tensor_location(name) != trt.TensorLocation.DEVICE:
            faults.append(f"{name} lies in the host's memory")
    if faults:
        raise UserError(
            f"{path} is not the engine that its sidecar describes: {faults[0]}. "
            f"Build it again: {sidecar.command}"
        )


def _tensor(plan: Any, name: str) -> EngineTensor:
    return EngineTensor(name, np.dtype(_TYPES[plan.get_tensor_dtype(name).name]))


def _read_profiles(plan: Any, name: str, planes_first: bool) -> tuple[Profile, ...]:
    """(N, H, W) of the input's range in every profile; a network of fixed shape has one point."""
    fixed = tuple(plan.get_tensor_shape(name))
    ranges: list[list[tuple[int, ...]]]
    if -1 not in fixed:
        ranges = [[fixed] * 3]
    else:
        ranges = [
            [tuple(one) for one in plan.get_tensor_profile_shape(name, index)]
            for index in range(plan.num_optimization_profiles)
        ]
    axes = (0, 2, 3) if planes_first else (0, 1, 2)
    found = []
    for shapes in ranges:
        smallest, usual, largest = [(s[axes[0]], s[axes[1]], s[axes[2]]) for s in shapes]
        found.append(Profile(smallest=smallest, usual=usual, largest=largest))
    return tuple(found)
