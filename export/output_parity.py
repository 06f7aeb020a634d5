"""Two ONNX files in onnxruntime on the same inputs: do the outputs that both have agree?"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, TensorProto, ValueInfoProto
from onnx.helper import tensor_dtype_to_np_dtype
from PIL import Image

from srdeploy.data.synth import scene
from srdeploy.errors import UserError
from srdeploy.export.certificate import Line
from srdeploy.graph.subgraph import real_inputs
from srdeploy.imaging import Pixels, normalise
from srdeploy.runtimes.onnx_runtime import first_line, import_onnxruntime, ort_errors
from srdeploy.spec import Spec
from srdeploy.validation import Settings

Array: TypeAlias = npt.NDArray[Any]
Feed: TypeAlias = dict[str, Array]
"""Input name -> value."""


TOLERANCE = 1e-4
"""Largest difference that fusing operators otherwise explains, as a share of the largest value."""
MOVED = 1e-3
"""Largest share of whole numbers (labels) that such rounding may change."""

_HUGE = float(np.finfo(np.float32).max)
"""Stands for an infinite difference: JSON has no infinity."""


class OutputCase(Settings):
    """One set of inputs."""

    inputs: dict[str, tuple[int, ...]]
    """Shape by name."""
    outputs: dict[str, tuple[int, ...]]
    """Shape by name, as the original gives them."""
    bits_equal: bool
    """Whether every output is equal bit for bit, without graph optimisation."""
    largest_value: float
    """Of the original's outputs, with graph optimisation."""
    largest_difference: float
    """With graph optimisation; float32's largest value where only one side is finite."""
    moved: float
    """Share of whole numbers that differ, with graph optimisation."""

    @property
    def passed(self) -> bool:
        close = self.largest_difference <= TOLERANCE * self.largest_value
        return self.bits_equal and close and self.moved <= MOVED


class OutputComparison(Settings):
    """What running both files showed."""

    pictures: str
    """What was fed, for people."""
    cases: tuple[OutputCase, ...]
    refused: tuple[str, ...]
    """Inputs that the original itself can't take, with its reason."""
    fault: str | None = None
    """Why nothing, or not everything, could be compared."""

    def line(self, kept: Sequence[str]) -> Line:
        """The line `parity` of a certificate."""
        names = ", ".join(f"'{name}'" for name in kept)
        passed = self.fault is None and all(case.passed for case in self.cases)
        return Line(
            name="parity",
            passed=passed,
            detail=f"{names} {self._verdict()}",
            figures={
                "tolerance": TOLERANCE,
                "moved_allowed": MOVED,
                **self.model_dump(mode="json"),
            },
        )

    def _verdict(self) -> str:
        if self.fault is not None:
            return f"not shown to be equal: {self.fault}"
        count = sum(case.bits_equal for case in self.cases)
        worst = max(case.largest_difference for case in self.cases)
        text = (
            f"equal bit for bit in {count} of {len(self.cases)} runs without onnxruntime's graph "
            f"optimisation, within {worst:.1e} with it"
        )
        moved = max(case.moved for case in self.cases)
        return f"{text}{f' and {moved:.2%} of labels differ' if moved else ''} ({self.pictures})"


def compare_outputs(
    original: ModelProto,
    files: tuple[Path, Path],
    kept: Sequence[str],
    *,
    photos: Sequence[Pixels] = (),
    spec: Spec | None = None,
) -> OutputComparison:
    """Runs files[0], which holds `original`, and files[1] on the CPU; compares the outputs `kept`.

    Images are `photos` uint8 [H, W, 3], resized and normalised as `spec` says, or else synthetic;
    other inputs are random values by type and shape. Nothing is raised where a file can't be run:
    the comparison says so. Raises UserError where onnxruntime is not installed.
    """
    import_onnxruntime()
    source = f"{len(photos)} photos" if photos else "synthetic images, no photos were given"
    inputs = SyntheticInputs(photos, spec)
    cases: list[OutputCase] = []
    refused: list[str] = []
    fault = None
    try:
        plain = _Pair(files, kept, optimised=False)
        fused = _Pair(files, kept, optimised=True)
        for feed in inputs.feeds(original, SIZES):
            _run_case(plain, fused, feed, cases, refused)
        for feed in inputs.feeds(original, FALLBACKS) if not cases else ():
            if not cases:
                _run_case(plain, fused, feed, cases, refused)
        if not cases:
            fault = f"the original takes none of the inputs tried ({refused[-1]})"
    except UserError as error:
        fault = str(error)
    return OutputComparison(
        pictures=source, cases=tuple(cases), refused=tuple(refused), fault=fault
    )


class _Pair:
    """Both files, loaded in one way."""

    def __init__(self, files: tuple[Path, Path], kept: Sequence[str], *, optimised: bool) -> None:
        self.kept = list(kept)
        self.original, self.stripped = (_session(file, optimised) for file in files)
        self._needed = {value.name for value in self.stripped.get_inputs()}

    def run_original(self, feed: Feed) -> list[Array]:
        return _arrays(self.original.run(self.kept, feed), self.kept)

    def run_stripped(self, feed: Feed) -> list[Array]:
        needed = {name: value for name, value in feed.items() if name in self._needed}
        try:
            return _arrays(self.stripped.run(self.kept, needed), self.kept)
        except ort_errors() as error:
            reason = first_line(error)
            raise UserError(
                f"the stripped file fails where the original runs ({reason})"
            ) from error


def _run_case(
    plain: _Pair, fused: _Pair, feed: Feed, cases: list[OutputCase], refused: list[str]
) -> None:
    shapes = {name: value.shape for name, value in feed.items()}
    try:
        expected = plain.run_original(feed)
        expected_fused = fused.run_original(feed)
    except ort_errors() as error:
        refused.append(f"{shapes}: {first_line(error)}")
        return
    found = plain.run_stripped(feed)
    equal = all(_same_bits(a, b) for a, b in zip(expected, found, strict=True))
    if not equal:
        again = plain.run_original(feed)
        if not all(_same_bits(a, b) for a, b in zip(expected, again, strict=True)):
            raise UserError("the original itself gives other values from run to run")
    largest, difference, moved = 0.0, 0.0, 0.0
    for a, b in zip(expected_fused, fused.run_stripped(feed), strict=True):
        one = _differences(a, b)
        largest, difference, moved = (
            max(largest, one[0]),
            max(difference, one[1]),
            max(moved, one[2]),
        )
    cases.append(
        OutputCase(
            inputs=shapes,
            outputs={name: a.shape for name, a in zip(plain.kept, expected, strict=True)},
            bits_equal=equal,
            largest_value=largest,
            largest_difference=difference,
            moved=moved,
        )
    )


def _session(file: Path, optimised: bool) -> Any:
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4  # faults arrive as exceptions; the log would repeat them
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except ort_errors() as error:
        raise UserError(f"onnxruntime can't load {file.name} ({first_line(error)})") from error


def _arrays(values: Sequence[object], names: Sequence[str]) -> list[Array]:
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, np.ndarray):
            raise UserError(f"'{name}' is no tensor")
    return [np.asarray(value) for value in values]


def _same_bits(a: Array, b: Array) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.tolist() == b.tolist() if a.dtype.kind == "O" else a.tobytes() == b.tobytes()


def _differences(a: Array, b: Array) -> tuple[float, float, float]:
    """Largest value and largest difference of floats; share of other values that differ."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return 0.0, _HUGE, 1.0
    if not a.size:
        return 0.0, 0.0, 0.0
    if a.dtype.kind != "f":
        return 0.0, 0.0, float((a != b).mean())
    left, right = a.astype(np.float64), b.astype(np.float64)
    same = (left == right) | (np.isnan(left) & np.isnan(right))
    with np.errstate(invalid="ignore"):
        distance = np.where(same, 0.0, np.abs(left - right))
    finite = np.abs(left[np.isfinite(left)])
    return (
        float(finite.max(initial=0.0)),
        float(np.nan_to_num(distance, nan=_HUGE, posinf=_HUGE).max()),
        0.0,
    )


# Inputs for any ONNX model: images where it takes images, else values by type and shape.

SIZES = ((1, 64, 96), (1, 97, 131), (1, 160, 224), (2, 64, 96))
"""(N, H, W) tried where the graph leaves them open: an odd size and a batch among them."""
FALLBACKS = ((1, 224, 224), (1, 256, 256), (1, 512, 512), (1, 512, 1024))
"""Tried one after the other where the original takes none of those."""
_SCENE = (144, 192)
"""(height, width) of synthetic images; each size is resized from them."""
_OTHER_AXIS = 8
"""Length of open axes of inputs that are no images."""


class SyntheticInputs:
    """Makes feeds: images are `photos` uint8 [H, W, 3], resized and normalised as `spec` says.

    Without photos, images are synthetic; without a spec, floats are in -1..1.
    """

    def __init__(self, photos: Sequence[Pixels], spec: Spec | None) -> None:
        self._photos = list(photos) or [
            scene(np.random.default_rng(seed), *_SCENE)[0] for seed in range(2)
        ]
        self._spec = spec
        self._rng = np.random.default_rng(0)

    def feeds(self, model: ModelProto, sizes: Sequence[tuple[int, int, int]]) -> list[Feed]:
        """One feed per size (N, H, W) that gives other shapes than those before.

        Raises UserError where an input's type has no synthetic values.
        """
        inputs = real_inputs(model)
        found: dict[tuple[tuple[int, ...], ...], Feed] = {}
        for size in sizes:
            shapes = _shapes(inputs, size)
            if tuple(shapes.values()) not in found:
                feed = {value.name: self._values(value, shapes[value.name]) for value in inputs}
                found[tuple(shapes.values())] = feed
        return list(found.values())

    def _values(self, value: ValueInfoProto, shape: tuple[int, ...]) -> Array:
        kind = value.type.tensor_type.elem_type
        dtype = np.dtype(object)
        if value.type.HasField("tensor_type") and kind != TensorProto.UNDEFINED:
            dtype = tensor_dtype_to_np_dtype(kind)
        if dtype.kind not in "iubf":
            raise UserError(f"no values can be drawn for the input '{value.name}' of its type")
        if len(shape) == 4 and dtype.kind in "uf" and 3 in (shape[1], shape[3]):
            return self._images(shape, dtype)
        if dtype.kind in "iub":
            # Whole numbers may be indices, and 0 and 1 are indices of almost everything.
            return np.asarray(self._rng.integers(0, 2, shape).astype(dtype))
        return np.asarray(self._rng.standard_normal(shape).astype(dtype))

    def _images(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        planar = shape[1] == 3
        height, width = shape[2:] if planar else shape[1:3]
        resized = [
            np.asarray(Image.fromarray(photo).resize((width, height))) for photo in self._photos
        ]
        images = np.stack([resized[index % len(resized)] for index in range(shape[0])])
        if dtype.kind == "u":
            values: Array = images.transpose(0, 3, 1, 2) if planar else images
        else:
            # Without a spec nobody knows the normalisation: the usual range will do.
            floats = (
                normalise(images, self._spec)
                if self._spec is not None
                else (images / 127.5 - 1).transpose(0, 3, 1, 2)
            )
            values = floats if planar else floats.transpose(0, 2, 3, 1)
        return np.ascontiguousarray(values.astype(dtype))


def _shapes(
    inputs: Sequence[ValueInfoProto], size: tuple[int, int, int]
) -> Mapping[str, tuple[int, ...]]:
    """A shape for each input, with `size` (N, H, W) where it is open; one symbol, one length."""
    symbols: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for value in sorted(inputs, key=lambda value: len(value.type.tensor_type.shape.dim) != 4):
        dims = value.type.tensor_type.shape.dim
        wished = _wished(value, size)
        shape = []
        for axis, wish in enumerate(wished):
            dim = dims[axis] if axis < len(dims) else None
            if dim is not None and dim.HasField("dim_value") and dim.dim_value > 0:
                shape.append(dim.dim_value)
            elif dim is not None and dim.dim_param:
                shape.append(symbols.setdefault(dim.dim_param, wish))
            else:
                shape.append(wish)
        shapes[value.name] = tuple(shape)
    return {value.name: shapes[value.name] for value in inputs}


def _wished(value: ValueInfoProto, size: tuple[int, int, int]) -> tuple[int, ...]:
    """Lengths for the axes that the graph leaves open."""
    count, height, width = size
    tensor = value.type.tensor_type
    if tensor.HasField("shape") and len(tensor.shape.dim) != 4:
        rank = len(tensor.shape.dim)
        return (count, *[_OTHER_AXIS] * (rank - 1)) if rank else ()
    channels_last = tensor.elem_type == TensorProto.UINT8
    if tensor.HasField("shape"):
        fixed = [dim.dim_value for dim in tensor.shape.dim]
        channels_last = fixed[3] == 3 or (channels_last and not fixed[1])
    return (count, height, width, 3) if channels_last else (count, 3, height, width)
