"""Which nodes of a graph compute in 16 bits, decided only by its structure.

In float32 stay: what comes before the first weighted operator (the images as numbers, and their
normalisation), what comes after the last ones (sums, resizes and the argmax of logits: 16 bits
would make ties), whatever is computed from shapes, operators that lose too much, and nodes that
were asked for. No value of a weight is looked at, so that two trainings get one graph.
"""

import difflib
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase

from onnx import GraphProto, NodeProto, TensorProto
from onnx.helper import get_attribute_value

from srdeploy.errors import UserError
from srdeploy.export.precision.tensor_types import FLOAT, Formal, formals_of
from srdeploy.graph.index import GraphIndex, bodies_of, label_of
from srdeploy.graph.operators import MEASURING, NETWORK, RESIZING

FLOAT32_OPERATORS = frozenset(
    # Sums over a whole image: 65504 is reached by 256 x 256 pixels of value 1, and a bfloat16 sum
    # stands still after 256 equal summands. The mean itself fits in 16 bits.
    ("ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceLogSum")
    + ("ReduceLogSumExp", "ReduceProd", "GlobalAveragePool", "GlobalLpPool", "CumSum", "CumProd")
    # Normalisations that square and sum, and whose definition does not already say float32 inside
    # (that of LayerNormalization does).
    + ("InstanceNormalization", "GroupNormalization", "MeanVarianceNormalization")
    + ("LpNormalization", "LRN", "LpPool")
    # Results that leave the range of fp16 for everyday operands, and what undoes them.
    + ("Exp", "Log", "Pow", "Sqrt", "Reciprocal")
    # Positions: 10 bits of mantissa are less than the columns of an image.
    + ("GridSample", "AffineGrid", "RoiAlign", "MaxRoiPool", "Range")
    # Their type is an attribute, and what they give is noise or a few constants.
    + ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial")
    + ("Bernoulli", "EyeLike", "ConstantOfShape", "HannWindow", "HammingWindow", "BlackmanWindow")
)
"""Softmax is not among them: it subtracts the maximum first, its terms are at most 1, and the
operators around it store 16 bits either way."""

_NOT_BUILT = {int(TensorProto.BFLOAT16): frozenset(("ConvTranspose", "HardSwish", "Mish"))}
"""Operators that ONNX defines for the type, but TensorRT for RTX 1.7 does not parse or build."""

_FLOAT32_ALWAYS = {
    **{(operator, "input"): 1 for operator in RESIZING},
    ("LayerNormalization", "output"): 1,
}
"""From this operand or result on float32 in any case: the region and scales of a resize, and the
statistics of a normalisation that computes in float32."""


def follows_precision(node: NodeProto, side: str, index: int, formal: Formal, half: int) -> bool:
    """Whether this operand or result (side: input, output) of a 16-bit node has 16 bits."""
    first = _FLOAT32_ALWAYS.get((node.op_type, side))
    return formal.variable and formal.allows(half) and (first is None or index < first)


def nodes_in_16_bits(
    graph: GraphProto, types: Mapping[str, int], opset: int, half: int, keep: Collection[str]
) -> set[int]:
    """Positions of the nodes that compute in `half`, an element type of 16 bits.

    types: as `element_types` gives them. keep: names of nodes, or shell patterns, that stay in
    float32; one that matches no node raises UserError.
    """
    kept = kept_nodes(graph, keep)
    able = {
        index
        for index, node in enumerate(graph.node)
        if index not in kept and _can(node, types, opset, half)
    }
    flow = _Flow(graph)
    chosen = {
        index
        for index in able & flow.late - flow.tail
        if not _loses_too_much(graph.node[index], flow.fed)
    }
    _return_to_float32(graph, flow, chosen)
    # Weights computed from weights go with their consumers.
    for index in sorted(able & flow.constant, reverse=True):
        consumers = flow.consumers(index)
        lossy = graph.node[index].op_type in FLOAT32_OPERATORS or flow.gives_output(index)
        if consumers and consumers <= chosen and not lossy:
            chosen.add(index)
    return chosen


class _Flow(GraphIndex):
    """Where each node stands between images and outputs."""

    def __init__(self, graph: GraphProto) -> None:
        super().__init__(graph)
        self.fed = set(self.inputs)
        """Values that depend on what the images show, not only on their shape."""
        self.late: set[int] = set()
        """Nodes at or after a weighted operator, of what the images show."""
        self.constant: set[int] = set()
        """Nodes that compute only from stored tensors."""
        self.tail: set[int] = set()
        """Nodes after which no weighted operator comes."""
        fixed, after = set(self.stored), set[str]()
        for index, (node, reads) in enumerate(zip(self.nodes, self.reads, strict=True)):
            if node.op_type in MEASURING:
                continue
            if not self.fed.isdisjoint(reads):
                self.fed.update(name for name in node.output if name)
                if _is_network(node) or not after.isdisjoint(reads):
                    self.late.add(index)
                    after.update(name for name in node.output if name)
            elif fixed.issuperset(reads):
                self.constant.add(index)
                fixed.update(node.output)
        for index in reversed(range(len(self.nodes))):
            if self.consumers(index) <= self.tail and not _is_network(self.nodes[index]):
                self.tail.add(index)


def is_named(node: NodeProto, pattern: str) -> bool:
    """Whether `pattern`, a name or a shell pattern, names the node."""
    return label_of(node) == pattern or fnmatchcase(label_of(node), pattern)


def kept_nodes(graph: GraphProto, keep: Collection[str]) -> set[int]:
    """Positions of the nodes that `keep` names or matches. Raises UserError for a pattern that
    matches none, with the closest name."""
    kept: set[int] = set()
    for pattern in keep:
        found = {index for index, node in enumerate(graph.node) if is_named(node, pattern)}
        if not found:
            labels = [label_of(node) for node in graph.node]
            close = difflib.get_close_matches(pattern, labels, n=1, cutoff=0.0)
            closest = f"; the closest is '{close[0]}'" if close else ""
            raise UserError(f"--keep {pattern}: no node has this name{closest}")
        kept |= found
    return kept


def _can(node: NodeProto, types: Mapping[str, int], opset: int, half: int) -> bool:
    """Whether the operator, as a whole, is there for 16-bit operands and results."""
    formals = formals_of(node, opset)
    if formals is None or any(True for _ in bodies_of(node)):
        return False
    if node.op_type in _NOT_BUILT.get(half, ()):
        return False
    follows = []
    for side, names, expected in zip(
        ("input", "output"), (node.input, node.output), formals, strict=True
    ):
        for index, (name, formal) in enumerate(zip(names, expected, strict=True)):
            if not name or types[name] != FLOAT or not formal.variable:
                continue
            first = _FLOAT32_ALWAYS.get((node.op_type, side))
            if first is None or index < first:
                follows.append(formal.allows(half))
    return bool(follows) and all(follows)


def _loses_too_much(node: NodeProto, fed: Collection[str]) -> bool:
    if node.op_type == "LayerNormalization":
        return _attribute(node, "stash_type", 1) != FLOAT
    if node.op_type == "Mul":  # a square leaves the range of fp16 at 256
        return bool(node.input[0] == node.input[1])
    if node.op_type == "Div":  # a divisor that the images decide may be too small for 16 bits
        return node.input[1] in fed
    return node.op_type in FLOAT32_OPERATORS


def _return_to_float32(graph: GraphProto, flow: _Flow, chosen: set[int]) -> None:
    """Takes out of `chosen` what stands only between float32 nodes, such as the small number that
    is added to a variance: 16 bits there would cost two casts and gain nothing."""
    inside = {index for index in chosen if not _is_network(graph.node[index])}
    settled = False
    while not settled:
        before = len(inside)
        for index in sorted(inside):
            reads = [name for name in flow.reads[index] if name in flow.fed]
            producers = {flow.producer[name] for name in reads if name in flow.producer}
            if not producers or any(p in chosen and p not in inside for p in producers):
                inside.discard(index)
        for index in sorted(inside, reverse=True):
            consumers = flow.consumers(index)
            if not consumers or any(c in chosen and c not in inside for c in consumers):
                inside.discard(index)
        settled = len(inside) == before
    chosen -= inside


def _is_network(node: NodeProto) -> bool:
    """Whether the node, or one in its bodies, is a weighted operator."""
    return node.op_type in NETWORK or holds_network(node)


def holds_network(node: NodeProto) -> bool:
    """Whether a body of the node holds a weighted operator."""
    return any(_is_network(inner) for body in bodies_of(node) for inner in body.node)


def _attribute(node: NodeProto, name: str, default: int) -> int:
    found = [a for a in node.attribute if a.name == name]
    return int(get_attribute_value(found[0])) if found else default
