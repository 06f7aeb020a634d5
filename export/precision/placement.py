"""Where a graph is rounded to int8: which operators, which of their operands, and which values must
share a scale.

Only what lies behind the first weighted operators is ever rounded, so that normalisation stays
exact; and only what lies before the last ones, so that the full-size resize and the argmax do.

- tensorrt: the inputs of weighted operators, and of each residual addition the operand that is not
  the convolution to be fused with it. Everything else stays float32: TensorRT fuses what follows a
  convolution into it, and carries int8 through pooling and the like by itself.
- cpu: runtimes on CPUs compute in int8 where all operands and the result are rounded, so
  results of weighted operators and of additions, concatenations, pooling and interior resizes are
  rounded as well, after the activation that follows. What only moves or selects values keeps the
  scale of what it reads. Where the last weighted operators read a residual sum, the sum and the
  convolution into it stay float32: such sums have heavy tails, eight bits leave most of their
  values zero, and nothing after them would even that out.

Values that the graph compares with each other (max-unpooling asks which pixel was the largest) are
never rounded on their way into the comparison.
"""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field

import onnx
from onnx import ModelProto, NodeProto, TensorProto

from srdeploy.graph.index import GraphIndex
from srdeploy.graph.operators import COMPARING, LAYERS, MEASURING, MOVING, PASSING
from srdeploy.precision import Target

_ACTIVATIONS = ("Relu", "Clip")
"""Rounding their result absorbs them: its range ends where theirs does."""
_JOINING = ("Add", "Concat", "AveragePool", "GlobalAveragePool")
"""Computed in int8 by onnxruntime, with a scale of the result's own."""
_FLOAT_ON_CPU = ("ConvTranspose",)
"""Weighted operators that onnxruntime does not compute in int8."""
_FLOAT_RESULT_ON_CPU = ("Gemm", "MatMul")
"""Weighted operators whose result onnxruntime can leave in float32."""


@dataclass
class Placement:
    """What becomes int8. Nodes are given by their index in the graph."""

    weighted: list[int] = field(default_factory=list)
    """Weighted operators whose kernel becomes int8."""
    reads: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """Maps each rounded value to its readers of rounded values, as (node, operand)."""
    shapes: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """By value that is rounded: who only asks for its shape, and can ask the int8 value."""
    same_scale: dict[str, str] = field(default_factory=dict)
    """Maps each rounded value to the rounded value whose scale it shares."""

    def scale_of(self, name: str) -> str:
        """The rounded value whose range decides the scale of `name`."""
        while name in self.same_scale:
            name = self.same_scale[name]
        return name


def place(model: ModelProto, target: Target, keep: Collection[int], ends: bool) -> Placement:
    """Where `model` is rounded to int8. `keep`: indices of nodes that stay float32; ends: whether
    the first and the last weighted operators become int8 too."""
    graph = _Graph(model)
    first, last = graph.ends()
    chosen = sorted(graph.weighted - set(keep) - (set() if ends else first | last))
    if target == "tensorrt":
        return _for_tensorrt(graph, chosen, keep)
    return _for_cpu(graph, chosen, set(keep) | (set() if ends else graph.sums_before(last)))


def is_weighted(node: NodeProto, stored: Collection[str]) -> bool:
    """Whether the node's second operand is a stored kernel or matrix."""
    return node.op_type in LAYERS and len(node.input) > 1 and node.input[1] in stored


def output_axis(node: NodeProto) -> int:
    """The axis of a weighted operator's kernel along which its output channels lie."""
    if node.op_type == "Gemm":
        transposed = any(a.name == "transB" and a.i for a in node.attribute)
        return 0 if transposed else 1
    return 0 if node.op_type == "Conv" else 1


def is_moving(node: NodeProto) -> bool:
    """Whether its results lie between values of its first operand."""
    modes = {a.name: a.s for a in node.attribute}
    return node.op_type in MOVING and modes.get("mode") != b"cubic"


class _Graph(GraphIndex):
    """Producers and consumers of values, and what lies behind and before weights."""

    def __init__(self, model: ModelProto) -> None:
        super().__init__(model.graph)
        graph = onnx.shape_inference.infer_shapes(model).graph
        values = (*graph.input, *graph.value_info, *graph.output)
        self.floats = {
            value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT
        } - self.stored
        dense = {tensor.name for tensor in graph.initializer}
        self.weighted = {i for i, node in enumerate(self.nodes) if is_weighted(node, dense)}
        self.behind: set[str] = set()
        """Values that a weighted operator comes before."""
        for index, node in enumerate(self.nodes):
            if index in self.weighted or not self.behind.isdisjoint(self._floats_read(node)):
                self.behind.update(node.output)
        self.before: set[str] = set()
        """Values that a weighted operator comes behind."""
        for index, node in reversed(list(enumerate(self.nodes))):
            if index in self.weighted or not self.before.isdisjoint(node.output):
                self.before.update(self._floats_read(node))

    def ends(self) -> tuple[set[int], set[int]]:
        """The weighted operators with none before them, and those with none behind them."""
        first, last = set(), set()
        for index in self.weighted:
            node = self.nodes[index]
            if self.behind.isdisjoint(self._floats_read(node)):
                first.add(index)
            if self.before.isdisjoint(node.output):
                last.add(index)
        return first, last

    def sums_before(self, last: Collection[int]) -> set[int]:
        """The nodes that lead to the last weighted operators, back to the weighted ones before
        them, where a residual sum is among them; else none. What other weighted operators read too
        is not followed."""
        inner = {self.nodes[index].input[0] for index in self.weighted - set(last)}
        found: set[int] = set()
        waiting = [self.nodes[index].input[0] for index in last]
        while waiting:
            name = waiting.pop()
            producer = self.producer.get(name)
            if producer is None or producer in found or name in inner:
                continue
            found.add(producer)
            if producer not in self.weighted:
                waiting += self._floats_read(self.nodes[producer])
        return found if any(self.nodes[index].op_type == "Add" for index in found) else set()

    def unshared(self, chosen: Collection[int], biases: bool) -> list[int]:
        """Those of `chosen` whose kernel is only read by them and along one axis: one kernel
        becomes int8 for all its consumers or for none. biases: and whose bias nothing else reads,
        because in int32 it has the scale of each consumer's input."""
        left = set(chosen)
        while True:
            lost = {index for index in left if not self._may_round(index, left, biases)}
            if not lost:
                return sorted(left)
            left -= lost

    def _may_round(self, index: int, left: Collection[int], biases: bool) -> bool:
        node = self.nodes[index]
        axis = output_axis(node)
        for user, operand in self.uses[node.input[1]]:
            if user not in left or operand != 1 or output_axis(self.nodes[user]) != axis:
                return False
        return not biases or len(node.input) < 3 or len(self.uses[node.input[2]]) == 1

    def between(self, node: NodeProto) -> bool:
        """Whether what the node reads and makes are floats behind weights and before others."""
        values = {name for name in (*self.main_reads(node), *node.output) if name}
        return values <= self.floats & self.behind and values <= self.before

    def compared(self) -> set[str]:
        """Values that reach a comparison without any arithmetic on the way."""
        found = {
            name
            for node in self.nodes
            if node.op_type in COMPARING or (node.op_type == "MaxPool" and len(node.output) > 1)
            for name in self._floats_read(node)
        }
        waiting = list(found)
        while waiting:
            producer = self.producer.get(waiting.pop())
            if producer is not None and self.nodes[producer].op_type in PASSING:
                more = set(self._floats_read(self.nodes[producer])) - found
                found |= more
                waiting += more
        return found

    def sole_consumer(self, name: str) -> NodeProto | None:
        uses = self.uses[name]
        if len(uses) == 1 and name not in self.outputs:
            return self.nodes[uses[0][0]]
        return None

    def after_activation(self, name: str) -> str:
        """The value itself, or that of the activation which is its only consumer."""
        consumer = self.sole_consumer(name)
        if consumer is not None and consumer.op_type in _ACTIVATIONS and consumer.input[0] == name:
            return str(consumer.output[0])
        return name

    def _floats_read(self, node: NodeProto) -> list[str]:
        return [name for name in node.input if name in self.floats]

    def main_reads(self, node: NodeProto) -> list[str]:
        """Operands that hold the values; those that say sizes or axes are left out."""
        return list(node.input[:1]) if is_moving(node) else list(node.input)


def _for_tensorrt(graph: _Graph, chosen: list[int], keep: Collection[int]) -> Placement:
    chosen = graph.unshared(chosen, biases=False)
    placement = Placement(weighted=chosen)
    reads: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for index in chosen:
        reads[graph.nodes[index].input[0]].append((index, 0))
    fused = {graph.nodes[index].output[0] for index in chosen}
    for index, node in enumerate(graph.nodes):
        if node.op_type != "Add" or index in keep or not graph.between(node):
            continue
        # TensorRT fuses the convolution that runs last; the other operand is read as int8.
        order = sorted((0, 1), key=lambda operand: graph.producer[node.input[operand]])
        late = node.input[order[1]]
        if late in fused and graph.sole_consumer(late) is not None:
            reads[node.input[order[0]]].append((index, order[0]))
    placement.reads = dict(reads)
    return placement


def _for_cpu(graph: _Graph, chosen: list[int], keep: Collection[int]) -> Placement:
    compared = graph.compared()
    chosen = [index for index in chosen if index not in keep]
    results = {i: graph.after_activation(graph.nodes[i].output[0]) for i in chosen}
    able = [
        index
        for index in chosen
        if graph.nodes[index].op_type not in _FLOAT_ON_CPU and results[index] not in compared
    ]
    chosen = graph.unshared(able, biases=True)
    placement = Placement(weighted=chosen)
    rounded: set[str] = set()
    for index, node in enumerate(graph.nodes):  # in topological order
        if index in chosen:
            rounded.add(node.input[0])
            if node.op_type not in _FLOAT_RESULT_ON_CPU:
                rounded.add(results[index])
        elif index not in keep and graph.between(node):
            reads = graph.main_reads(node)
            if not compared.isdisjoint((*reads, node.output[0])):
                continue
            if node.op_type in _JOINING:
                rounded.update((*reads, graph.after_activation(node.output[0])))
            elif is_moving(node) and reads[0] in rounded:
                rounded.add(node.output[0])
                placement.same_scale[node.output[0]] = reads[0]
    for name in sorted(rounded):
        uses = graph.uses[name]
        if name in compared:  # the comparison and all but weighted operators read it as it is
            uses = [(i, operand) for i, operand in uses if i in chosen]
        asking = [use for use in uses if graph.nodes[use[0]].op_type in MEASURING]
        placement.shapes[name] = asking
        placement.reads[name] = [use for use in uses if use not in asking]
    return placement
