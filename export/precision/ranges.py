"""Which range of each value int8 shall tell apart, measured on pictures.

The range of a value holds all but one in ten thousand of what it was on the pictures: without the
few outliers, the steps are finer for the rest. Of several rules this gave the highest agreement on
average (docs/results/int8-ranges.md). Pictures are run one by one, and values fetched in groups, so
that memory does not grow with their number.
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

OUTLIERS = 1e-4
"""Share of what a value was that its range leaves out."""
SAMPLES = 2**19
"""Numbers looked at for each value, over all pictures; drawn where there are more."""
_GROUP_BYTES = 2**29
"""Most that values and samples take at once, for the largest picture; a larger value is fetched
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
        task = bar.add_task("calibrating", total=len(groups) * len(pictures))
        for group in groups:
            session = _session(model, group)
            samples: dict[str, list[Floats]] = {name: [] for name in group}
            for index, picture in enumerate(pictures):
                for name, values in _values(session, signature, group, picture):
                    _check_finite(values, name)
                    samples[name].append(drawn(values, SAMPLES // len(pictures), seed=index))
                bar.advance(task)
            for name in group:
                found[name] = range_without_outliers(np.concatenate(samples.pop(name)))
    return found


def drawn(values: Floats, count: int, seed: int) -> Floats:
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
