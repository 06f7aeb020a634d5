"""QuantizeLinear and DequantizeLinear written into a graph.

x ~ scale * (q - zero point). An activation has one scale; a kernel is int8, symmetric, with one
scale per output channel.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, helper
from onnx.numpy_helper import from_array, to_array

from srdeploy.export.precision.placement import Placement, output_axis
from srdeploy.graph.index import GraphIndex
from srdeploy.precision import Target

Ranges = Mapping[str, tuple[float, float]]
"""Maps each value to the (lowest, highest) range that int8 must represent."""
Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.integer]

_MOST_STEPS = 2.0**30
"""Of a bias, in its own scale; int32 holds twice as many."""


def write_rounding(model: ModelProto, placement: Placement, ranges: Ranges, target: Target) -> None:
    """Rounds `model` where `placement` says, in place; every rounded value needs its range.

    Nodes and values keep their names. What is new is called after the node that it follows, or
    after the weighted node that it serves: head/Conv/QuantizeLinear, head/Conv/weight/... .
    """
    _Writer(model, placement, ranges, target).write()


def activation_scale(lowest: float, highest: float, target: Target) -> tuple[Floats, Integers]:
    """Scale and zero point, both of rank 0. cpu: uint8 from lowest to highest; tensorrt: int8,
    symmetric. 0 is always exact; a value that is always 0 gets scale 1."""
    lowest, highest = min(lowest, 0.0), max(highest, 0.0)
    if target == "tensorrt":
        scale, zero = np.float32(max(-lowest, highest) / 127), np.array(0, np.int8)
    else:
        scale = np.float32((highest - lowest) / 255)
        zero = np.array(np.rint(-lowest / scale) if scale else 0, np.uint8)
    return np.array(scale if scale else 1, np.float32), zero


def quantise_kernel(kernel: Floats, axis: int, least: Floats | None) -> tuple[Integers, Floats]:
    """int8 of the kernel's shape, and scales [C] of its output channels along `axis`.

    least: scales [C] that must be reached, so that a bias in steps of input and kernel fits int32.
    A channel of zeros gets scale 1, where nothing else is needed.
    """
    others = tuple(i for i in range(kernel.ndim) if i != axis)
    scale = np.abs(kernel).max(axis=others) / np.float32(127)
    if least is not None:
        scale = np.maximum(scale, least)
    scale = np.where(scale > 0, scale, 1).astype(np.float32)
    shape = [-1 if i == axis else 1 for i in range(kernel.ndim)]
    steps = np.rint(kernel / scale.reshape(shape))
    return np.clip(steps, -127, 127).astype(np.int8), scale


class _Writer:
    def __init__(
        self, model: ModelProto, placement: Placement, ranges: Ranges, target: Target
    ) -> None:
        self._graph = model.graph
        self._placement = placement
        self._ranges = ranges
        self._target = target
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self._nodes: list[NodeProto] = []
        self._kernels: dict[str, str] = {}

    def write(self) -> None:
        nodes = [NodeProto.FromString(node.SerializeToString()) for node in self._graph.node]
        produced = GraphIndex(self._graph).producer
        read = {i: nodes[i].input[0] for i in self._placement.weighted}
        least = self._least_scales(nodes) if self._target == "cpu" else {}
        for name in self._placement.reads:
            if name not in produced:
                self._round(name, nodes)
        for index, node in enumerate(nodes):
            if index in read:
                self._write_kernel(node, read[index], least)
            self._nodes.append(node)
            for name in node.output:
                if name in self._placement.reads:
                    self._round(name, nodes)
        del self._graph.node[:]
        self._graph.node.extend(self._nodes)
        used = {name for node in self._nodes for name in node.input}
        left = [t for t in self._graph.initializer if t.name in used]
        new = [t for name, t in self._stored.items() if name not in {t.name for t in left}]
        del self._graph.initializer[:]
        self._graph.initializer.extend([*left, *(t for t in new if t.name in used)])

    def _round(self, name: str, nodes: Sequence[NodeProto]) -> None:
        """The pair behind the value; its consumers get what the pair makes of it."""
        stem = name.removesuffix("_out")
        scale, zero = self._scale(name)
        operands = [self._store(f"{stem}/scale", scale), self._store(f"{stem}/zero_point", zero)]
        quantised = self._add("QuantizeLinear", stem, [name, *operands])
        rounded = self._add("DequantizeLinear", stem, [quantised, *operands])
        for index, operand in self._placement.reads[name]:
            nodes[index].input[operand] = rounded
        for index, operand in self._placement.shapes.get(name, ()):
            nodes[index].input[operand] = quantised

    def _write_kernel(self, node: NodeProto, read: str, least: Mapping[str, Floats]) -> None:
        stem = node.output[0].removesuffix("_out")
        name = node.input[1]
        if name not in self._kernels:  # one pair for all who share it
            axis = output_axis(node)
            values, scale = quantise_kernel(to_array(self._stored[name]), axis, least.get(name))
            operands = [
                self._store(f"{name}/int8", values),
                self._store(f"{name}/scale", scale),
                self._store(f"{name}/zero_point", np.zeros(scale.shape, np.int8)),
            ]
            made = self._add("DequantizeLinear", f"{stem}/weight", operands, axis=axis)
            self._kernels[name] = made
        scale = to_array(self._stored[f"{name}/scale"])
        node.input[1] = self._kernels[name]
        bias = self._bias(node)
        if self._target == "cpu" and bias is not None:
            step = (self._scale(read)[0] * scale).astype(np.float32)
            operands = [
                self._store(f"{stem}/bias/int32", np.rint(bias / step).astype(np.int32)),
                self._store(f"{stem}/bias/scale", step),
                self._store(f"{stem}/bias/zero_point", np.zeros(step.shape, np.int32)),
            ]
            node.input[2] = self._add("DequantizeLinear", f"{stem}/bias", operands, axis=0)

    def _least_scales(self, nodes: Sequence[NodeProto]) -> dict[str, Floats]:
        """Maps each kernel to the scales [C] below which a bias would not fit int32."""
        found: dict[str, Floats] = {}
        for node in (nodes[index] for index in self._placement.weighted):
            bias = self._bias(node)
            if bias is not None:
                least = np.abs(bias) / (self._scale(node.input[0])[0] * np.float32(_MOST_STEPS))
                kernel = node.input[1]
                found[kernel] = np.maximum(found.get(kernel, np.float32(0)), least)
        return found

    def _bias(self, node: NodeProto) -> Floats | None:
        name = node.input[2] if len(node.input) > 2 else ""
        if name not in self._stored or len(self._stored[name].dims) != 1:
            return None
        return to_array(self._stored[name])

    def _scale(self, name: str) -> tuple[Floats, Integers]:
        return activation_scale(*self._ranges[self._placement.scale_of(name)], self._target)

    def _store(self, name: str, values: npt.NDArray[np.generic]) -> str:
        self._stored[name] = from_array(values, name)
        return name

    def _add(self, operator: str, stem: str, operands: list[str], axis: int | None = None) -> str:
        name = f"{stem}/{operator}"
        node = helper.make_node(operator, operands, [f"{name}_out"], name=name)
        if axis is not None:
            node.attribute.append(helper.make_attribute("axis", axis))
        self._nodes.append(node)
        return f"{name}_out"
