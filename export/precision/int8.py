"""int8 as explicit QuantizeLinear and DequantizeLinear pairs, calibrated on photos."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, TensorProto

from srdeploy import console
from srdeploy.data.dataset import LAYOUTS
from srdeploy.data.pairs import photos_below
from srdeploy.errors import UserError
from srdeploy.export.precision.placement import Placement, is_weighted, place
from srdeploy.export.precision.qdq import write_rounding
from srdeploy.export.precision.zones import kept_nodes
from srdeploy.graph.operators import LAYERS, QUANTISING
from srdeploy.graph.signature import Signature, opset_of, signature_of
from srdeploy.imaging import PHOTO_SUFFIXES, Pixels, fit, normalise, read_photo
from srdeploy.precision import PRECISION_KEY, TARGET_KEY, Target
from srdeploy.runtimes.onnx_runtime import first_line, import_onnxruntime, ort_errors
from srdeploy.spec import Spec

LEAST_OPSET = 13
"""The first operator set in which DequantizeLinear takes a scale per channel."""


def to_int8(
    model: ModelProto,
    pictures: Sequence[Pixels],
    target: Target,
    keep: Collection[str] = (),
    ends: bool = False,
) -> ModelProto:
    """A copy of `model` that is rounded to int8 where it pays; inputs and outputs keep their types.

    model: float32, with its tensors loaded. pictures: uint8 [H, W, 3], as the network will see
    them. keep: names of nodes, or shell patterns of names, that stay float32. ends: whether the
    first and the last weighted operators become int8 too. Nodes and values keep their names. The
    same pictures give the same bytes. Raises UserError where nothing is there to be quantised, for
    a graph that is not float32, a pattern that matches nothing, and pictures that can't be used.
    """
    _check_pictures(pictures)
    _check_graph(model)
    kept = kept_nodes(model.graph, keep)
    placement = place(model, target, kept, ends)
    if not placement.weighted:
        raise UserError(
            "int8 would quantise nothing: the graph's weighted operators are all among the first "
            "and last ones, kept in float32, or of kinds that have no int8 form; quantise the "
            "first and last too (--set quantise_ends=true), keep fewer, or deploy it in fp16"
        )
    ranges = measure_ranges(model, _measured(placement), pictures)
    converted = ModelProto()
    converted.CopyFrom(model)
    write_rounding(converted, placement, ranges, target)
    metadata = {entry.key: entry.value for entry in converted.metadata_props}
    metadata |= {PRECISION_KEY: "int8", TARGET_KEY: target}
    onnx.helper.set_model_props(converted, dict(sorted(metadata.items())))
    onnx.checker.check_model(converted, full_check=True)
    return converted


def _measured(placement: Placement) -> list[str]:
    """The values whose ranges decide, in a fixed order."""
    return sorted({placement.scale_of(name) for name in placement.reads})


def _check_pictures(pictures: Sequence[Pixels]) -> None:
    if not pictures:
        raise UserError("int8 needs pictures to measure ranges on, and none were given")
    for index, picture in enumerate(pictures):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise UserError(
                f"calibration picture {index} is {picture.dtype} {list(picture.shape)}: "
                "uint8 [H, W, 3] is needed"
            )


def _check_graph(model: ModelProto) -> None:
    graph = model.graph
    for node in graph.node:
        if node.op_type in (*QUANTISING, "QLinearConv", "ConvInteger"):
            raise UserError(
                f"the graph is quantised already (node '{node.name}', {node.op_type}): "
                "give the fp32 export"
            )
    stored = {tensor.name: tensor for tensor in graph.initializer}
    weighted = [node for node in graph.node if is_weighted(node, stored)]
    if not weighted:
        raise UserError(
            f"the graph has no {', '.join(LAYERS[:-1])} or {LAYERS[-1]} with stored weights: "
            "there is nothing to quantise"
        )
    for node in weighted:
        kind = stored[node.input[1]].data_type
        if kind != TensorProto.FLOAT:
            name = TensorProto.DataType.Name(kind).lower()
            raise UserError(
                f"the weights of node '{node.name}' are {name}: int8 starts from the fp32 export"
            )
    if opset_of(model) < LEAST_OPSET:
        raise UserError(
            f"the graph is of operator set {opset_of(model)}, and int8 needs {LEAST_OPSET} or "
            "newer: export it again with a newer one"
        )


# Calibrated ranges

Floats = npt.NDArray[np.float32]

OUTLIERS = 1e-4
"""Share of what a value was that its range leaves out."""
SAMPLES = 2**19
"""Numbers looked at for each value, over all pictures; drawn where there are more."""
_GROUP_BYTES = 2**29
"""Most that values and samples take at once, for the largest picture; a larger value has a
run of its own."""


def measure_ranges(
    model: ModelProto, names: Sequence[str], pictures: Sequence[Pixels]
) -> dict[str, tuple[float, float]]:
    """The range (lowest <= 0 <= highest) of each value in `names`.

    pictures: uint8 [H, W, 3]. Raises UserError for NaN and infinity, and where onnxruntime can't
    run the graph on a picture.
    """
    signature = signature_of(model, Path("the graph to be quantised"))
    groups = _groups(model, signature, names, max(pictures, key=np.size))
    found: dict[str, tuple[float, float]] = {}
    with console.progress() as bar:
        task = bar.add_task("calibrating", total=len(groups) * len(pictures))
        for group in groups:
            session = _session(model, group)
            samples: dict[str, list[Floats]] = {name: [] for name in group}
            for index, picture in enumerate(pictures):
                for name, values in _values(session, signature, group, picture):
                    _check_finite(values, name)
                    samples[name].append(sampled(values, SAMPLES // len(pictures), seed=index))
                bar.advance(task)
            for name in group:
                found[name] = range_without_outliers(np.concatenate(samples.pop(name)))
    return found


def sampled(values: Floats, count: int, seed: int) -> Floats:
    """`count` of the values, float32 [count], always the same; all where there are no more."""
    flat = values.ravel()
    if flat.size <= count:
        return flat
    return flat[np.random.default_rng(seed).integers(0, flat.size, count)]


def range_without_outliers(values: Floats) -> tuple[float, float]:
    """(lowest <= 0 <= highest) without the outermost OUTLIERS of the values, half of them at each
    end where both signs occur."""
    signed = values.min() < 0 < values.max()
    share = OUTLIERS / 2 if signed else OUTLIERS
    lowest, highest = np.quantile(values, (share, 1 - share))
    return min(float(lowest), 0.0), max(float(highest), 0.0)


def _check_finite(values: Floats, name: str) -> None:
    if not np.isfinite((values.min(), values.max())).all():
        raise UserError(
            f"value '{name}' is NaN or infinite on the calibration pictures: no range can be "
            "measured; look at the weights that the network was exported with"
        )


def _groups(
    model: ModelProto, signature: Signature, names: Sequence[str], picture: Pixels
) -> list[list[str]]:
    """The names in groups of values that can be fetched together, sized on `picture`."""
    measured = ModelProto()
    measured.CopyFrom(model)
    asked = [f"{name}/size of value {index}" for index, name in enumerate(names)]
    for name, size in zip(names, asked, strict=True):
        measured.graph.node.append(onnx.helper.make_node("Size", [name], [size]))
    session = _session(measured, asked, TensorProto.INT64)
    groups: list[list[str]] = []
    left = 0
    for name, (_, size) in zip(names, _values(session, signature, asked, picture), strict=True):
        needed = 4 * (int(size) + SAMPLES)
        if not groups or needed > left:
            groups.append([])
            left = _GROUP_BYTES
        groups[-1].append(name)
        left -= needed
    return groups


def _session(model: ModelProto, names: Sequence[str], kind: int = TensorProto.FLOAT) -> Any:
    """A session that gives the values named, and computes nothing else."""
    exposed = ModelProto()
    exposed.CopyFrom(model)
    del exposed.graph.output[:]
    exposed.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, kind, None) for name in names
    )
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(
        exposed.SerializeToString(), sess_options=options, providers=["CPUExecutionProvider"]
    )


def _values(
    session: Any, signature: Signature, names: Sequence[str], picture: Pixels
) -> Iterator[tuple[str, Any]]:
    images = picture[None]
    if signature.input == "float32":
        assert signature.spec is not None, "our exports carry their spec"
        feed: npt.NDArray[Any] = normalise(images, signature.spec)
    else:
        feed = np.ascontiguousarray(images)
    try:
        results = session.run(list(names), {signature.input_name: feed})
    except ort_errors() as error:
        height, width = picture.shape[:2]
        raise UserError(
            f"onnxruntime can't run the graph on a calibration picture of {width}x{height} "
            f"({first_line(error)})"
        ) from error
    yield from zip(names, results, strict=True)


# Calibration photos

RECOMMENDED = 64
LEAST = 8
"""With fewer, ranges are a matter of chance; they are taken where no more were asked for."""

_SPLIT = "train"


def calibration_pictures(folder: Path, spec: Spec, count: int) -> list[Pixels]:
    """`count` photos of `folder`, spread evenly over it by name, fitted as `spec` says.

    folder: photos, also in sub-folders, or a data set, of which the split train is taken. Returns
    uint8 [H, W, 3] each, of different sizes where the photos differ; always the same ones. All are
    taken where there are fewer than `count`, with a warning. Raises UserError where there are none
    or too few, for one that can't be read or is too small, and for a data set without train.
    """
    files = _files(folder)
    if not files:
        kinds = ", ".join(sorted(PHOTO_SUFFIXES))
        raise UserError(
            f"{folder} has no photos to calibrate int8 on: {kinds} are looked for, also in "
            f"sub-folders; {RECOMMENDED} photos like those that the network will see are "
            "recommended"
        )
    found = len(files)
    if found < min(count, LEAST):
        raise UserError(
            f"{folder} has {found} photos, too few to calibrate int8 on: {RECOMMENDED} are "
            f"recommended, {LEAST} at least"
        )
    if found < count:
        console.warn(f"{folder} has {found} photos to calibrate int8 on, not {count}: all are used")
    chosen = [files[index * found // min(count, found)] for index in range(min(count, found))]
    return [fit(read_photo(file), spec) for file in chosen]


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"no such folder of photos: {folder}")
    if (folder / "images" / _SPLIT).is_dir():
        return photos_below(folder / "images" / _SPLIT)
    for layout in LAYOUTS.values():
        home = layout.home(folder)
        splits = layout.splits(home) if home is not None else ()
        if home is None or not splits:
            continue
        if _SPLIT not in splits:
            raise UserError(
                f"{folder} is a data set without the split {_SPLIT} (it has {', '.join(splits)}): "
                "give the folder of the photos that int8 shall be calibrated on"
            )
        pairs = layout.pairs(home, _SPLIT)
        items = sorted((*pairs.items, *pairs.bare), key=lambda item: item.name)
        return [item.image for item in items]
    return photos_below(folder)
