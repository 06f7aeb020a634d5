"""Where two graphs with equal names part: the error of every layer, and where it first jumps.

Conversions keep the names of nodes and of their output tensors, so that one picture run through
both graphs shows at which node a difference begins.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto

from srdeploy.errors import UserError
from srdeploy.graph.index import GraphIndex
from srdeploy.graph.signature import signature_of
from srdeploy.imaging import Pixels, normalise
from srdeploy.runtimes.onnx_runtime import first_line, import_onnxruntime, ort_errors
from srdeploy.validation import Settings

JUMP = 4.0
"""A layer's error jumps where it is as many times what came in, or what only rounding gives."""
SUGGESTED = 8
"""The number of nodes named for --keep."""

_FP16_LARGEST = 65504.0
_NEAR_OVERFLOW = _FP16_LARGEST / 2
"""Other photos have larger values than the one that was looked at."""
_CHUNK_BYTES = 256 * 1024 * 1024
"""Of one graph's tensors held at a time."""

Values = npt.NDArray[Any]


class LayerError(Settings):
    """How far one node's output lies from the reference's."""

    node: str
    operator: str
    error: float | None
    """Root mean square of the difference over that of the reference's values; None where the
    candidate gives NaN or infinity."""
    before: float | None
    """The largest error among the nodes it reads from; 0 where it only reads the image, None
    where one of them gives NaN or infinity."""
    largest: float
    """The reference's largest absolute value."""
    reads: tuple[str, ...]
    """Nodes it reads from, other nodes than those compared passed over."""

    def jumps(self, rounding: float) -> bool:
        """Whether the difference begins here, and is more than `rounding` (relative) explains."""
        if self.before is None:
            return False
        return self.error is None or self.error > JUMP * max(self.before, rounding)


def layer_errors(reference: ModelProto, candidate: ModelProto, picture: Pixels) -> list[LayerError]:
    """The error of each node whose float output both graphs have, in topological order.

    reference: float32. candidate: the same graph converted; extra nodes are passed over. bfloat16
    graphs must be emulated first (onnxruntime has no such arithmetic on CPUs). picture: uint8
    [H, W, 3], run as a batch of one. Tensors are compared a few at a time, so that memory stays
    bounded. Raises UserError where onnxruntime can't run one of the graphs.
    """
    nodes = _comparable(reference, candidate)
    feed = _feed(reference, picture)
    sizes = _byte_sizes(reference, [node.output[0] for node in nodes], feed)
    found: dict[str, tuple[float | None, float]] = {}
    for names in _chunks(sizes):
        expected = _run(reference, names, feed, "the reference")
        actual = _run(candidate, names, feed, "the converted graph")
        for name, left, right in zip(names, expected, actual, strict=True):
            largest = np.abs(left[np.isfinite(left)]).max(initial=0.0)
            found[name] = _relative_error(left, right), float(largest)
    return list(_with_inputs(reference, nodes, found))


def first_jump(errors: Sequence[LayerError], rounding: float) -> LayerError | None:
    """The first node that gives NaN or infinity, else the first whose error jumps; or None."""
    broken = (one for one in errors if one.error is None)
    return next(broken, None) or next((one for one in errors if one.jumps(rounding)), None)


def nodes_to_keep(errors: Sequence[LayerError], rounding: float) -> list[str]:
    """Nodes that, kept in float32, should mend the difference; in topological order."""
    if any(one.error is None for one in errors):
        # A large tensor stays large for whoever reads it: its consumers must be kept as well.
        large = {one.node for one in errors if one.largest > _NEAR_OVERFLOW}
        named = [one.node for one in errors if one.node in large or large & set(one.reads)]
        broken = first_jump(errors, rounding)
        return (named or [broken.node] if broken else named)[:SUGGESTED]
    jumping = [one for one in errors if one.jumps(rounding)]
    if not jumping:
        jumping = sorted(errors, key=_growth, reverse=True)[:3]
    names = {one.node for one in jumping}
    return [one.node for one in errors if one.node in names][:SUGGESTED]


def explain_jump(errors: Sequence[LayerError], rounding: float, convertible: bool) -> str:
    """For people: where the difference begins and, for a converted graph, the flags against it."""
    if not errors:
        return "the graphs have no layers of equal names: where they part can't be said"
    first = first_jump(errors, rounding)
    if first is None and not any(one.error for one in errors):
        return "layer by layer both graphs compute the same"
    if first is None:
        last = errors[-1]
        text = (
            f"the difference grows step by step to {last.error or 0:.2%} at '{last.node}', "
            "no layer stands out"
        )
        remedy = "those that add most stay in float32 with"
    elif first.error is None:
        text = (
            f"the first NaN or infinity comes from node '{first.node}' ({first.operator}), where "
            f"the reference reaches {first.largest:.3g}"
        )
        text += f" (fp16 ends at {_FP16_LARGEST:.0f})" * (first.largest > _NEAR_OVERFLOW)
        remedy = "keep it, and what reads it, in float32 with"
    else:
        text = (
            f"the difference begins at node '{first.node}' ({first.operator}): "
            f"{first.before or 0:.2%} before it, {first.error:.2%} after it"
        )
        remedy = "keep it in float32 with"
    if not convertible:
        return text
    flags = " ".join(f"--keep '{name}'" for name in nodes_to_keep(errors, rounding))
    return f"{text}; {remedy} {flags}"


def _growth(one: LayerError) -> float:
    return (one.error or 0.0) - (one.before or 0.0)


def _comparable(reference: ModelProto, candidate: ModelProto) -> list[NodeProto]:
    """The reference's nodes, in its order, whose first output is float32 and in both graphs."""
    inferred = onnx.shape_inference.infer_shapes(reference).graph
    floats = {
        value.name
        for value in (*inferred.value_info, *inferred.output)
        if value.type.tensor_type.elem_type == TensorProto.FLOAT
    }
    there = GraphIndex(candidate.graph).producer.keys()
    return [
        node
        for node in reference.graph.node
        if node.output[0] in floats & there and node.op_type != "Constant"
    ]


def _feed(reference: ModelProto, picture: Pixels) -> dict[str, Values]:
    signature = signature_of(reference, Path("the reference"))
    images = np.ascontiguousarray(picture[None])
    if signature.input == "uint8":
        return {signature.input_name: images}
    if signature.spec is None:
        raise UserError("the reference takes normalised images, but carries no srdeploy metadata")
    return {signature.input_name: normalise(images, signature.spec)}


def _byte_sizes(
    model: ModelProto, names: Sequence[str], feed: Mapping[str, Values]
) -> dict[str, int]:
    """Bytes of each tensor at the feed's size; the largest known where inference can't tell."""
    fixed = ModelProto()
    fixed.CopyFrom(model)
    for value in fixed.graph.input:
        if value.name in feed:
            dims = value.type.tensor_type.shape.dim
            for dim, length in zip(dims, feed[value.name].shape, strict=True):
                dim.dim_value = length
    inferred = onnx.shape_inference.infer_shapes(fixed, data_prop=True).graph
    values = (*inferred.value_info, *inferred.output)
    shapes = {value.name: value.type.tensor_type.shape.dim for value in values}
    known = {
        name: 4 * prod(dim.dim_value for dim in shapes[name])
        for name in names
        if name in shapes and all(dim.HasField("dim_value") for dim in shapes[name])
    }
    most = max(known.values(), default=_CHUNK_BYTES)
    return {name: known.get(name, most) for name in names}


def _chunks(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    chunk: list[str] = []
    held = 0
    for name, size in sizes.items():
        if chunk and held + size > _CHUNK_BYTES:
            yield chunk
            chunk, held = [], 0
        chunk.append(name)
        held += size
    if chunk:
        yield chunk


def _run(
    model: ModelProto, names: Sequence[str], feed: Mapping[str, Values], what: str
) -> list[Values]:
    """The named tensors, computed as the graph says: without onnxruntime's optimisations, which
    would do away with tensors."""
    ort = import_onnxruntime()
    exposed = ModelProto()
    exposed.CopyFrom(model)
    del exposed.graph.output[:]
    exposed.graph.output.extend(ValueInfoProto(name=name) for name in names)
    options = ort.SessionOptions()
    options.log_severity_level = 4  # faults arrive as exceptions; the log would repeat them
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(
            exposed.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return [np.asarray(value) for value in session.run(list(names), dict(feed))]
    except ort_errors() as error:
        raise UserError(
            f"{what} can't be run layer by layer in onnxruntime ({first_line(error)})"
        ) from error


def _relative_error(expected: Values, actual: Values) -> float | None:
    if expected.shape != actual.shape:
        raise UserError(f"layers of one name have shapes {expected.shape} and {actual.shape}")
    left, right = expected.astype(np.float64), actual.astype(np.float64)
    finite = np.isfinite(left)  # masks hold infinities by design
    if not np.isfinite(right[finite]).all():
        return None
    left, right = left[finite], right[finite]
    difference = float(np.sqrt(np.square(left - right).sum()))
    scale = float(np.sqrt(np.square(left).sum()))
    return difference / scale if scale else float(difference > 0)


def _with_inputs(
    reference: ModelProto,
    nodes: Sequence[NodeProto],
    found: Mapping[str, tuple[float | None, float]],
) -> Iterator[LayerError]:
    """Adds what each node reads from, through nodes that were not compared."""
    names = {node.output[0]: node.name or node.output[0] for node in nodes}
    reads: dict[str, frozenset[str]] = {}
    for node in reference.graph.node:
        sources: set[str] = set()
        for name in node.input:
            sources |= {name} if name in names else reads.get(name, frozenset())
        for name in node.output:
            reads[name] = frozenset(sources)
    for node in nodes:
        output = node.output[0]
        error, largest = found[output]
        inputs = [found[name][0] for name in reads[output]]
        known = [one for one in inputs if one is not None]
        yield LayerError(
            node=names[output],
            operator=node.op_type,
            error=error,
            before=max(known, default=0.0) if len(known) == len(inputs) else None,
            largest=largest,
            reads=tuple(sorted(names[name] for name in reads[output])),
        )
