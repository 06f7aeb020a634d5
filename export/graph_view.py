"""A graph as the isomorphism check reads it: what makes each value, in topological order."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    NodeProto,
    SparseTensorProto,
    TensorProto,
    ValueInfoProto,
)
from onnx.helper import get_attribute_value, tensor_dtype_to_np_dtype
from onnx.numpy_helper import from_array, to_array

Numbers: TypeAlias = dict[object, int]
"""Value numbers shared by the graphs under comparison: equal keys get equal numbers."""

_LEARNT_OPERANDS = {
    **dict.fromkeys(("Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "DeformConv"), 1),
    **dict.fromkeys(("Gemm", "MatMul", "MatMulInteger", "QLinearMatMul", "PRelu"), 1),
    **dict.fromkeys(("BatchNormalization", "InstanceNormalization", "LayerNormalization"), 1),
    **dict.fromkeys(("GroupNormalization", "GRU", "LSTM", "RNN", "QuantizeLinear"), 1),
    "DequantizeLinear": 0,
}
"""First operand of each weighted operator that is learnt or calibrated."""

_RESIZERS = ("Resize", "Upsample")
"""Their operands after the first are region, scales and sizes: geometry, though partly floats."""


@dataclass(frozen=True, eq=False)
class Input:
    """An input of the graph or of a body."""

    view: "GraphView"
    name: str
    position: int

    def __str__(self) -> str:
        return f"input '{self.name}'"


@dataclass(frozen=True, eq=False)
class Constant:
    """An initialiser, or a Constant node's value."""

    view: "GraphView"
    name: str
    tensor: TensorProto
    position: int
    """In topological order: that of its first reader."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.dims)

    @property
    def dtype(self) -> str:
        return str(TensorProto.DataType.Name(self.tensor.data_type)).lower()

    @property
    def steers(self) -> bool:
        """Whether its value belongs to the graph rather than to the weights."""
        return self.name in self.view.steering

    def array(self) -> npt.NDArray[np.generic]:
        return to_array(self.tensor)

    def key(self) -> tuple[object, ...]:
        """Equal for constants that count as the same."""
        if not self.steers:
            return (self.dtype, self.shape)
        values = self.array()
        content = values.tolist() if values.dtype.kind == "O" else values.tobytes()
        return (self.dtype, self.shape, repr(content))

    def __str__(self) -> str:
        return f"initialiser '{self.name}' ({self.dtype} {list(self.shape)})"


@dataclass(frozen=True, eq=False)
class Made:
    """A node."""

    view: "GraphView"
    node: NodeProto
    position: int

    @property
    def operator(self) -> str:
        domain = self.node.domain
        own = domain in ("", "ai.onnx")
        return self.node.op_type if own else f"{domain}.{self.node.op_type}"

    @property
    def operands(self) -> list[str]:
        """Names of the operands; "" for an absent one, none at the end."""
        return _without_empty_end(list(self.node.input))

    @property
    def results(self) -> list[bool]:
        """Which results it gives."""
        return [bool(name) for name in _without_empty_end(list(self.node.output))]

    def attributes(self) -> "dict[str, str | GraphView]":
        """Attributes by name: bodies as views, everything else as text."""
        found: dict[str, str | GraphView] = {}
        for attribute in self.node.attribute:
            for index, body in enumerate(_bodies(attribute)):
                key = f"{attribute.name}[{index}]"
                found[key] = self.view.body_view(self.position, key, body)
            if attribute.type not in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
                found[attribute.name] = _attribute_text(attribute)
        return found

    def __str__(self) -> str:
        name = self.node.name or next((n for n in self.node.output if n), "unnamed")
        return f"node '{name}' ({self.operator})"


Source: TypeAlias = Input | Constant | Made


class GraphView:
    """One graph, function or body. `parent` is the graph around a body."""

    def __init__(self, graph: GraphProto, parent: "GraphView | None" = None) -> None:
        self.parent = parent
        self._bodies: dict[tuple[int, str], GraphView] = {}
        self._types = {value.name: value for value in (*graph.input, *graph.output)}
        tensors = {tensor.name: tensor for tensor in _stored(graph)}
        self.inputs = [value.name for value in graph.input if value.name not in tensors]
        self.outputs = [value.name for value in graph.output]
        ordered = [node for node in _ordered(graph) if not _is_constant_node(node)]
        self.nodes = [Made(self, node, position) for position, node in enumerate(ordered)]
        readers: dict[str, int] = {}
        for made in self.nodes:
            for name in (*made.node.input, *_read_by_bodies(made.node)):
                readers.setdefault(name, made.position)
        self.constants = [
            Constant(self, name, tensor, readers.get(name, len(self.nodes)))
            for name, tensor in tensors.items()
        ]
        self._sources: dict[str, tuple[Source, int]] = {}
        for index, name in enumerate(self.inputs):
            self._sources[name] = (Input(self, name, index), 0)
        for constant in self.constants:
            self._sources[constant.name] = (constant, 0)
        for made in self.nodes:
            for slot, name in enumerate(made.node.output):
                if name:
                    self._sources[name] = (made, slot)
        self.late = self._names_after_weights()
        self.steering = self._names_of_steering_constants()

    def source(self, name: str) -> tuple[Source, int]:
        """What makes the value, and as which of its results."""
        if name in self._sources:
            return self._sources[name]
        assert self.parent is not None, f"value '{name}' has no source"
        return self.parent.source(name)

    def body_view(self, node: int, attribute: str, graph: GraphProto) -> "GraphView":
        """The view of a body of one of this graph's nodes, made once."""
        if (node, attribute) not in self._bodies:
            self._bodies[node, attribute] = GraphView(graph, self)
        return self._bodies[node, attribute]

    def value_type(self, name: str) -> str:
        """Dtype and shape of an input or output; ? for a dynamic axis."""
        return _type_text(self._types[name])

    def numbered(self, numbers: Numbers, outer: dict[str, int] | None = None) -> dict[str, int]:
        """A number per value: equal where everything upstream is equal, also across graphs."""
        found = dict(outer or {})
        for index, name in enumerate(self.inputs):
            found[name] = _number(numbers, ("input", index, self.value_type(name)))
        for constant in self.constants:
            found[constant.name] = _number(numbers, ("constant", constant.key()))
        for made in self.nodes:
            attributes: list[tuple[str, object]] = []
            for key, value in sorted(made.attributes().items()):
                if isinstance(value, GraphView):
                    inside = value.numbered(numbers, found)
                    attributes.append((key, tuple(inside[name] for name in value.outputs)))
                else:
                    attributes.append((key, value))
            operands = tuple(found[name] if name else -1 for name in made.operands)
            computed = (made.operator, tuple(attributes), operands, tuple(made.results))
            for slot, name in enumerate(made.node.output):
                if name:
                    found[name] = _number(numbers, (*computed, slot))
        return found

    def _names_after_weights(self) -> set[str]:
        """Values that some weighted operator comes before."""
        late = set(self.parent.late) if self.parent is not None else set()
        for made in self.nodes:
            if made.node.op_type in _LEARNT_OPERANDS or not late.isdisjoint(made.node.input):
                late.update(name for name in made.node.output if name)
        return late

    def _names_from_the_input(self) -> set[str]:
        """Values in which the values of an input are; its shape alone makes none."""
        found = set(self.inputs)
        for made in self.nodes:
            outer = any(name and name not in self._sources for name in made.node.input)
            if made.node.op_type in ("Shape", "Size"):
                continue
            if outer or _read_by_bodies(made.node) or not found.isdisjoint(made.node.input):
                found.update(name for name in made.node.output if name)
        return found

    def _names_of_steering_constants(self) -> set[str]:
        learnt: set[str] = set()
        steering = {c.name for c in self.constants if c.tensor.dims == [] or _is_discrete(c.tensor)}
        met = self._names_from_the_input()
        chains: dict[str, set[str]] = {}  # by a value made of constants alone: what it is made of
        for made in self.nodes:
            node = made.node
            first = _LEARNT_OPERANDS.get(node.op_type)
            if first is not None:
                learnt.update(node.input[first:])
            elif self.late.isdisjoint(node.input):
                behind = set(node.input).union(*(chains.get(name, ()) for name in node.input))
                if met.isdisjoint(node.output):
                    chains.update(dict.fromkeys(node.output, behind))
                else:
                    steering.update(behind)
            elif node.op_type in _RESIZERS:
                for name in node.input[1:]:
                    steering.update({name}, chains.get(name, ()))
            for name in _read_by_bodies(node):
                steering.update({name}, chains.get(name, ()))
        for name in self.outputs:
            steering.update({name}, chains.get(name, ()))
        return steering - learnt


def view_of(graph: GraphProto | FunctionProto) -> GraphView:
    """The view of a model's graph or of a function."""
    if isinstance(graph, GraphProto):
        return GraphView(graph)
    plain = GraphProto(node=graph.node)
    plain.input.extend(ValueInfoProto(name=name) for name in graph.input)
    plain.output.extend(ValueInfoProto(name=name) for name in graph.output)
    return GraphView(plain)


def short_values(constant: Constant, shown: int = 4) -> str:
    """The first values of a constant, for messages."""
    flat = constant.array().ravel()
    text = ", ".join(f"{v:.6g}" if flat.dtype.kind == "f" else str(v) for v in flat[:shown])
    return f"[{text}{', ...' if flat.size > shown else ''}]"


def _number(numbers: Numbers, key: object) -> int:
    return numbers.setdefault(key, len(numbers))


def _without_empty_end(names: list[str]) -> list[str]:
    while names and not names[-1]:
        names.pop()
    return names


def _bodies(attribute: AttributeProto) -> list[GraphProto]:
    if attribute.type == AttributeProto.GRAPH:
        return [attribute.g]
    return list(attribute.graphs) if attribute.type == AttributeProto.GRAPHS else []


def _attribute_text(attribute: AttributeProto) -> str:
    if attribute.ref_attr_name:
        return f"of the caller's {attribute.ref_attr_name}"
    value = get_attribute_value(attribute)
    if isinstance(value, TensorProto):
        return f"{TensorProto.DataType.Name(value.data_type)} {to_array(value).tolist()}"
    if attribute.type == AttributeProto.TENSORS:
        return str([to_array(tensor).tolist() for tensor in value])
    return str(list(value)) if not isinstance(value, str | bytes | int | float) else str(value)


def _type_text(value: ValueInfoProto) -> str:
    if not value.type.HasField("tensor_type"):
        return value.type.WhichOneof("value") or "untyped"
    tensor = value.type.tensor_type
    dtype = TensorProto.DataType.Name(tensor.elem_type).lower()
    if not tensor.HasField("shape"):
        return f"{dtype} of any rank"
    dims = [str(d.dim_value) if d.HasField("dim_value") else "?" for d in tensor.shape.dim]
    return f"{dtype} [{', '.join(dims)}]"


def _stored(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield _dense(sparse)
    for node in graph.node:
        if _is_constant_node(node):
            yield _tensor_of(node)


def _dense(sparse: SparseTensorProto) -> TensorProto:
    """The tensor that a sparse one stands for; its values lie at flat positions or coordinates."""
    places = to_array(sparse.indices)
    if places.ndim == 2:
        places = np.ravel_multi_index(tuple(places.T), tuple(sparse.dims))
    stored = to_array(sparse.values)
    flat = np.zeros(int(np.prod(sparse.dims)), stored.dtype)
    np.put(flat, places, stored)
    return from_array(flat.reshape(tuple(sparse.dims)), sparse.values.name)


def _is_constant_node(node: NodeProto) -> bool:
    return node.op_type == "Constant" and node.domain in ("", "ai.onnx")


def _tensor_of(node: NodeProto) -> TensorProto:
    """A Constant node as the initialiser that it could be."""
    (attribute,) = node.attribute
    if attribute.type == AttributeProto.TENSOR:
        tensor = TensorProto()
        tensor.CopyFrom(attribute.t)
    else:
        value = get_attribute_value(attribute)
        tensor = TensorProto(dims=[] if not _is_list(attribute) else [len(value)])
        content = value if _is_list(attribute) else [value]
        if attribute.type in (AttributeProto.FLOAT, AttributeProto.FLOATS):
            tensor.data_type = TensorProto.FLOAT
            tensor.float_data.extend(content)
        elif attribute.type in (AttributeProto.INT, AttributeProto.INTS):
            tensor.data_type = TensorProto.INT64
            tensor.int64_data.extend(content)
        else:
            tensor.data_type = TensorProto.STRING
            tensor.string_data.extend(content)
    tensor.name = node.output[0]
    return tensor


def _is_list(attribute: AttributeProto) -> bool:
    return attribute.type in (AttributeProto.FLOATS, AttributeProto.INTS, AttributeProto.STRINGS)


def _is_discrete(tensor: TensorProto) -> bool:
    return tensor_dtype_to_np_dtype(tensor.data_type).kind not in "fcV"


def _ordered(graph: GraphProto) -> list[NodeProto]:
    """Nodes after what they read; among those that are ready, in the file's order."""
    makers = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    users: list[list[int]] = [[] for _ in graph.node]
    missing = [0] * len(graph.node)
    for index, node in enumerate(graph.node):
        reads = {makers[n] for n in (*node.input, *_read_by_bodies(node)) if n in makers}
        missing[index] = len(reads)
        for maker in reads:
            users[maker].append(index)
    ready = deque(index for index, count in enumerate(missing) if count == 0)
    order: list[NodeProto] = []
    while ready:
        index = ready.popleft()
        order.append(graph.node[index])
        for user in users[index]:
            missing[user] -= 1
            if not missing[user]:
                ready.append(user)
    assert len(order) == len(graph.node), "the graph has a cycle"
    return order


def _read_by_bodies(node: NodeProto) -> list[str]:
    """What the node's bodies read from the graphs around them."""
    found: dict[str, None] = {}
    for attribute in node.attribute:
        for body in _bodies(attribute):
            inside = {value.name for value in body.input}
            inside.update(tensor.name for tensor in body.initializer)
            inside.update(name for inner in body.node for name in inner.output)
            for inner in body.node:
                found.update(dict.fromkeys([*inner.input, *_read_by_bodies(inner)]))
            found.update(dict.fromkeys(value.name for value in body.output))
            for name in inside:
                found.pop(name, None)
    found.pop("", None)
    return list(found)
