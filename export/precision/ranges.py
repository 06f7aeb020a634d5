"""Which range of each value int8 shall tell apart, measured on pictures.

The range of a value holds all but one in ten thousand of what it was on the pictures: without the
few outliers, the steps are finer for the rest. Of several rules this was the best one over all
networks and both targets (docs/results has the figures). Pictures are run one by one, and values
fetched in groups, so that memory does not grow with their number.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, TensorProto

from srdeploy import console
from srdeploy.errors import UserError
from srdeploy.imaging import Pixels, normalise
from srdeploy.serve.onnx_runtime import first_line, import_onnxruntime, ort_errors
from srdeploy.serve.signature import Signature, signature_of

Floats = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]

BINS = 8192
OUTLIERS = 1e-4
"""Share of the values that a range leaves out."""
_GROUP_BYTES = 2**29
"""Most that the values fetched at once take, for the largest picture; a larger one is fetched
alone."""


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
        task = bar.add_task("calibrating", total=2 * len(groups) * len(pictures))
        for group in groups:
            session = _session(model, group)
            full = dict.fromkeys(group, (0.0, 0.0))
            counts = dict.fromkeys(group, np.zeros(BINS, np.int64))
            for picture in pictures:
                for name, values in _values(session, signature, group, picture):
                    full[name] = _widened(full[name], values, name)
                bar.advance(task)
            for picture in pictures:
                for name, values in _values(session, signature, group, picture):
                    counts[name] = counts[name] + histogram(values, *full[name])
                bar.advance(task)
            for name in group:
                found[name] = range_without_outliers(counts[name], *full[name])
    return found


def histogram(values: Floats, lowest: float, highest: float) -> Counts:
    """How many values lie in each of equal parts of [lowest, highest], int64 [BINS]."""
    if highest == lowest:
        return np.zeros(BINS, np.int64)
    places = (values.ravel() - np.float32(lowest)) * np.float32(BINS / (highest - lowest))
    counts = np.bincount(np.clip(places.astype(np.int32), 0, BINS - 1), minlength=BINS)
    return counts.astype(np.int64)


def range_without_outliers(counts: Counts, lowest: float, highest: float) -> tuple[float, float]:
    """The range that leaves out OUTLIERS of the values, half of them at each end where both signs
    occur; it holds 0.

    counts: int64 [BINS], as `histogram` gives them for lowest <= 0 <= highest.
    """
    total = int(counts.sum())
    if not total:
        return lowest, highest
    cut = OUTLIERS * total / (2 if lowest < 0 < highest else 1)
    width = (highest - lowest) / BINS
    below, above = np.cumsum(counts), np.cumsum(counts[::-1])
    low = lowest + width * int(np.searchsorted(below, cut, side="right")) if lowest < 0 else 0.0
    high = highest - width * int(np.searchsorted(above, cut, side="right")) if highest > 0 else 0.0
    return min(low, 0.0), max(high, 0.0)


def _widened(full: tuple[float, float], values: Floats, name: str) -> tuple[float, float]:
    lowest, highest = float(values.min()), float(values.max())
    if not np.isfinite((lowest, highest)).all():
        raise UserError(
            f"value '{name}' is NaN or infinite on the calibration pictures: no range can be "
            "measured; look at the weights that the network was exported with"
        )
    return min(full[0], lowest), max(full[1], highest)


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
        needed = 4 * int(size)
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
