"""A graph as the walk of `isomorphism` reads it, on onnx-ir: sources, constants and what steers."""

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx import AttributeProto, GraphProto, ModelProto, SparseTensorProto, TensorProto
from onnx.numpy_helper import from_array, to_array

Numbers: TypeAlias = dict[object, int]
"""Value numbers shared by the graphs under comparison: equal keys get equal numbers."""

Source: TypeAlias = ir.Node | ir.Value
"""Where a value comes from: a node, or an input or constant, which is its own source."""

_LEARNT_OPERANDS = {
    **dict.fromkeys(("Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "DeformConv"), 1),
    **dict.fromkeys(("Gemm", "MatMul", "MatMulInteger", "QLinearMatMul", "PRelu"), 1),
    **dict.fromkeys(("BatchNormalization", "InstanceNormalization", "LayerNormalization"), 1),
    **dict.fromkeys(("GroupNormalization", "GRU", "LSTM", "RNN", "QuantizeLinear"), 1),
    "DequantizeLinear": 0,
}
"""First operand of each weighted operator that is learnt or calibrated. The oracle judges, so it
keeps a table of its own."""

_RESIZERS = ("Resize", "Upsample")
"""Their operands after the first are region, scales and sizes: geometry, though partly floats."""


class GraphView:
    """One graph or function with all bodies in it, as the walk reads it."""

    def __init__(self, graph: ir.Graph) -> None:
        graph.sort()
        self.graph = graph
        self.tensors: dict[ir.Value, ir.TensorProtocol] = {}
        """Initialisers, and what Constant nodes give."""
        self.position: dict[Source, int] = {}
        """In topological order within the graph or body; a constant's is that of its first
        consumer."""
        self.outputs_of: dict[ir.Graph, list[ir.Value]] = {}
        self._late: set[ir.Value] = set()
        """Values after a weighted operator."""
        self._steering: set[ir.Value] = set()
        """Constants whose value belongs to the graph rather than to the weights."""
        self._resolve_outputs(graph, {})
        self._read(graph)
        self.inputs, self.outputs = _inputs(graph), self.outputs_of[graph]

    def source(self, value: ir.Value) -> tuple[Source, int]:
        """What produces the value, and as which of its results."""
        node = value.producer()
        if node is None or value in self.tensors:
            assert value in self.position, f"value '{value.name}' has no source"
            return value, 0
        return node, value.index() or 0

    def kind(self, source: Source) -> tuple[object, ...]:
        """What two sources must have in common to be compared further."""
        if isinstance(source, ir.Node):
            return ("node", _operator(source))
        tensor = self.tensors.get(source)
        if tensor is None:
            return ("input",)
        return ("constant", tensor.dtype, tuple(tensor.shape), source in self._steering)

    def content(self, source: Source) -> tuple[object, ...]:
        """Equal for constants that count as the same."""
        assert isinstance(source, ir.Value)
        tensor = self.tensors[source]
        kind = (tensor.dtype, tuple(tensor.shape))
        if source not in self._steering:
            return kind
        values = tensor.numpy()
        return (*kind, repr(values.tolist()) if values.dtype.kind == "O" else values.tobytes())

    def label(self, source: Source) -> str:
        """For messages."""
        if isinstance(source, ir.Node):
            named = source.name or next((v.name for v in source.outputs if v.name), "unnamed")
            return f"node '{named}' ({_operator(source)})"
        tensor = self.tensors.get(source)
        if tensor is None:
            return f"input '{source.name}'"
        return f"initialiser '{source.name}' ({tensor.dtype.name.lower()} {list(tensor.shape)})"

    def unpaired(
        self, paired: dict[Source, Source], numbers: Numbers
    ) -> list[tuple[Source, object]]:
        """Nodes and initialisers without a partner, with their value numbers."""
        found: dict[ir.Value, int] = {}
        self._number(self.graph, numbers, found)
        sources: list[tuple[Source, object]] = [
            (node, tuple(found.get(value, -1) for value in node.outputs))
            for node in _nodes(self.graph)
        ]
        sources += [(constant, found[constant]) for constant in _constants(self.graph)]
        return [(source, number) for source, number in sources if source not in paired]

    def _number(self, graph: ir.Graph, numbers: Numbers, found: dict[ir.Value, int]) -> None:
        """A number per value: equal where everything upstream is equal, also across graphs."""

        def number(*key: object) -> int:
            return numbers.setdefault(key, len(numbers))

        for index, value in enumerate(_inputs(graph)):
            found[value] = number("input", index, type_text(value))
        for constant in _constants(graph):
            found[constant] = number("constant", self.content(constant))
        for node in _nodes(graph):
            attributes: list[tuple[str, object]] = []
            for key, content in sorted(attributes_of(node).items()):
                if isinstance(content, ir.Graph):
                    self._number(content, numbers, found)
                    outputs = tuple(found[value] for value in self.outputs_of[content])
                    attributes.append((key, outputs))
                else:
                    attributes.append((key, content))
            operands = tuple(-1 if value is None else found[value] for value in operands_of(node))
            computed = (_operator(node), tuple(attributes), operands, tuple(results_of(node)))
            for slot, value in enumerate(node.outputs):
                if value.name:
                    found[value] = number(*computed, slot)

    def _resolve_outputs(self, graph: ir.Graph, outer: dict[str | None, ir.Value]) -> None:
        """Notes the outputs of `graph` and its bodies; `outer` are the values around a body.

        onnx-ir does not link a body's output to a value from outside the body.
        """
        values = [*graph.inputs, *graph.initializers.values()]
        values += [value for node in graph for value in node.outputs]
        names = outer | {value.name: value for value in values if value.name}
        self.outputs_of[graph] = [names[value.name] for value in graph.outputs]
        for node in graph:
            for body in _bodies(node):
                self._resolve_outputs(body, names)

    def _read(self, graph: ir.Graph) -> None:
        """Notes positions, constants and what steers, in `graph` and then in its bodies."""
        inputs, nodes, tensors = _inputs(graph), _nodes(graph), _constants(graph)
        first: dict[ir.Value | None, int] = {}
        for place, node in enumerate(nodes):
            for value in (*node.inputs, *self._captured(node)):
                first.setdefault(value, place)
            if node.op_type in _LEARNT_OPERANDS or not self._late.isdisjoint(node.inputs):
                self._late.update(node.outputs)
        self.tensors.update(tensors)
        self.position.update({value: place for place, value in enumerate(inputs)})
        self.position.update({node: place for place, node in enumerate(nodes)})
        self.position.update({value: first.get(value, len(nodes)) for value in tensors})
        self._steering |= self._steering_in(graph) & tensors.keys()
        for node in nodes:
            for body in _bodies(node):
                self._read(body)

    def _steering_in(self, graph: ir.Graph) -> set[ir.Value]:
        learnt: set[ir.Value | None] = set()
        steering = {
            value
            for value, tensor in _constants(graph).items()
            if not tuple(tensor.shape) or tensor.dtype.numpy().kind not in "fcV"
        }
        fed = set(_inputs(graph))  # values that an input's values are in; its shape makes none
        chains: dict[ir.Value, set[ir.Value]] = {}
        """By a value made only of constants: what it is made of."""
        for node in _nodes(graph):
            reads = {value for value in node.inputs if value is not None}
            captured = self._captured(node)
            met = captured or any(value in fed or value.graph is not graph for value in reads)
            if met and node.op_type not in ("Shape", "Size"):
                fed.update(node.outputs)
            first = _LEARNT_OPERANDS.get(node.op_type)
            if first is not None:
                learnt.update(node.inputs[first:])
            elif self._late.isdisjoint(reads):
                behind = reads.union(*(chains.get(value, ()) for value in reads))
                if fed.isdisjoint(node.outputs):
                    chains.update(dict.fromkeys(node.outputs, behind))
                else:
                    steering |= behind
            elif node.op_type in _RESIZERS:
                steering.update(*({v}.union(chains.get(v, ())) for v in node.inputs[1:] if v))
            steering.update(*({value}.union(chains.get(value, ())) for value in captured))
        for value in self.outputs_of[graph]:
            steering.update({value}, chains.get(value, ()))
        return steering - learnt

    def _captured(self, node: ir.Node) -> list[ir.Value]:
        """What the node's bodies read from the graphs around them."""
        found: dict[ir.Value, None] = {}
        for body in _bodies(node):
            reads = [v for inner in body for v in (*inner.inputs, *self._captured(inner)) if v]
            reads += self.outputs_of[body]
            found.update(dict.fromkeys(value for value in reads if value.graph is not body))
        return list(found)


def with_dense_initialisers(model: ModelProto) -> ModelProto:
    """`model`, or a copy where it has sparse initialisers: onnx-ir reads dense ones only."""
    if not any(graph.sparse_initializer for graph in _graphs(model.graph)):
        return model
    dense = ModelProto()
    dense.CopyFrom(model)
    for graph in _graphs(dense.graph):
        graph.initializer.extend(_dense(sparse) for sparse in graph.sparse_initializer)
        graph.ClearField("sparse_initializer")
    return dense


def operands_of(node: ir.Node) -> list[ir.Value | None]:
    """None for an absent operand, none at the end."""
    operands = list(node.inputs)
    while operands and operands[-1] is None:
        operands.pop()
    return operands


def results_of(node: ir.Node) -> list[bool]:
    """Which results the node gives."""
    results = [bool(value.name) for value in node.outputs]
    while results and not results[-1]:
        results.pop()
    return results


def attributes_of(node: ir.Node) -> dict[str, str | ir.Graph]:
    """Attributes by name: bodies as graphs, everything else as text."""
    found: dict[str, str | ir.Graph] = {}
    for name, attribute in node.attributes.items():
        value = attribute.value
        if attribute.is_ref():
            found[name] = f"of the caller's {attribute.ref_attr_name}"
        elif attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            bodies = [value] if isinstance(value, ir.Graph) else value
            found |= {f"{name}[{index}]": body for index, body in enumerate(bodies)}
        elif attribute.type == ir.AttributeType.TENSOR:
            found[name] = f"{value.dtype.name} {value.numpy().tolist()}"
        elif attribute.type == ir.AttributeType.TENSORS:
            found[name] = str([(one.dtype.name, one.numpy().tolist()) for one in value])
        else:
            found[name] = str(list(value) if isinstance(value, tuple | list) else value)
    return found


def counts_of(graph: ir.Graph) -> tuple[int, ...]:
    """How many inputs, outputs and nodes the graph has."""
    return (len(_inputs(graph)), len(graph.outputs), len(_nodes(graph)))


def type_text(value: ir.Value) -> str:
    """Dtype and shape of an input or output; ? for a dynamic axis."""
    if not isinstance(value.type, ir.TensorType):
        return "untyped" if value.type is None else repr(value.type)
    dtype = value.type.dtype.name.lower()
    if value.shape is None:
        return f"{dtype} of any rank"
    dims = [str(dim) if isinstance(dim, int) else "?" for dim in value.shape]
    return f"{dtype} [{', '.join(dims)}]"


def short_values(tensor: ir.TensorProtocol, shown: int = 4) -> str:
    """The first values of a constant, for messages."""
    flat: npt.NDArray[np.generic] = tensor.numpy().ravel()
    text = ", ".join(f"{v:.6g}" if flat.dtype.kind == "f" else str(v) for v in flat[:shown])
    return f"[{text}{', ...' if flat.size > shown else ''}]"


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        if attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
            for body in (attribute.g, *attribute.graphs):
                yield from _graphs(body)


def _dense(sparse: SparseTensorProto) -> TensorProto:
    """The tensor that a sparse one stands for; its values lie at flat positions or coordinates."""
    places = to_array(sparse.indices)
    if places.ndim == 2:
        places = np.ravel_multi_index(tuple(places.T), tuple(sparse.dims))
    stored = to_array(sparse.values)
    flat = np.zeros(int(np.prod(sparse.dims)), stored.dtype)
    np.put(flat, places, stored)
    return from_array(flat.reshape(tuple(sparse.dims)), sparse.values.name)


def _inputs(graph: ir.Graph) -> list[ir.Value]:
    """The inputs that must be fed: old files list initialisers as inputs too."""
    return [value for value in graph.inputs if not value.is_initializer()]


def _nodes(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if not _is_constant(node)]


def _constants(graph: ir.Graph) -> dict[ir.Value, ir.TensorProtocol]:
    """Initialisers, and Constant nodes as if they were initialisers."""
    tensors = {v: v.const_value for v in graph.initializers.values() if v.const_value is not None}
    for node in graph:
        if _is_constant(node):
            (attribute,) = node.attributes.values()
            stored = attribute.type == ir.AttributeType.TENSOR
            # ir.tensor makes float32 and int64 of Python's numbers, as ONNX says.
            tensors[node.outputs[0]] = attribute.value if stored else ir.tensor(attribute.value)
    return tensors


def _is_constant(node: ir.Node) -> bool:
    return node.op_type == "Constant" and node.domain in ("", "ai.onnx")


def _operator(node: ir.Node) -> str:
    own = node.domain in ("", "ai.onnx")
    return node.op_type if own else f"{node.domain}.{node.op_type}"


def _bodies(node: ir.Node) -> Iterator[ir.Graph]:
    return (value for value in attributes_of(node).values() if isinstance(value, ir.Graph))
