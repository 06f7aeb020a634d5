"""A graph's digest: what it computes with any weights, independent of names and of the order of
nodes.

In: operators, domains, attributes, topology, dtypes and shapes of initialisers, inputs and outputs,
operator sets, functions, and the values that steer the computation. Out: names, doc strings,
metadata, weight values. A value steers where it is an integer or a boolean, a float of rank 0, or
where the input reaches it before any weighted operator (the normalisation's mean and deviation), as
it stands or computed only from constants. Operands of weighted operators are weights, whatever
their type, and so is a class token, which the input reaches after a convolution. A Constant node
counts as an initialiser. The scales and the region that a resize reads steer too, wherever it
stands.

Method: colour refinement (Weisfeiler-Lehman) along topological order. Each vertex gets a colour
from its ancestors, then one from its users; the digest is taken over the sorted colours.
Initialisers are vertices of their own, so that sharing a weight is seen.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

Colour = bytes

WEIGHTED = frozenset(
    ("Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "DeformConv")
    + ("Gemm", "MatMul", "MatMulInteger", "QLinearMatMul", "PRelu", "GRU", "LSTM", "RNN")
    + ("BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization")
    + ("QuantizeLinear", "DequantizeLinear")
)
"""Operators whose operands after the first are learnt or calibrated."""

MEASURING = frozenset(("Shape", "Size"))
"""Operators that read only a value's shape."""

RESIZING = frozenset(("Resize", "Upsample"))
"""Operators whose operands after the first say where they sample, in floats."""

_ROUNDS = 2
"""The second round lets every node see which weights its relatives share."""


def graph_digest(model: ModelProto) -> str:
    """The digest of `model` as 64 hexadecimal digits. Tensors in side files must be loaded."""
    functions = [
        _hash(
            "function",
            function.domain,
            function.name,
            len(function.input),
            sorted(function.attribute),
            _colour_graph(_from_function(function), {}),
        )
        for function in model.functions
    ]
    opsets = sorted((_domain(opset.domain), opset.version) for opset in model.opset_import)
    return _hash("model", opsets, sorted(functions), _colour_graph(model.graph, {})).hex()


@dataclass(frozen=True)
class _Value:
    """A value while colouring: its colour from above, and whether a weighted operator came
    before.
    """

    colour: Colour
    weighted: bool


@dataclass
class _Vertex:
    """An input, an initialiser or a node."""

    above: Colour
    below: Colour = b""
    uses: list[tuple[int, int, int]] = field(default_factory=list)
    """(output slot, user's index or -1 for a graph output, position)."""


def _colour_graph(graph: GraphProto, outer: Mapping[str, _Value]) -> Colour:
    """One colour for a whole graph; `outer` are the values of enclosing graphs that a body may
    read.
    """
    nodes = [node for node in _in_order(graph) if not _is_constant(node)]
    tensors = {tensor.name: tensor for tensor in _constants(graph)}
    seeds: dict[int, Colour] = {}
    result = b""
    for _ in range(_ROUNDS):
        vertices, origin = _pass_down(graph, nodes, tensors, outer, seeds)
        _note_uses(graph, nodes, vertices, origin)
        _pass_up(vertices)
        seeds = {i: _hash(v.above, v.below) for i, v in enumerate(vertices)}
        outputs = [
            _hash("output", _type_of(value), *_position(value.name, origin, seeds, outer))
            for value in graph.output
        ]
        inputs = [_type_of(value) for value in graph.input if value.name not in tensors]
        result = _hash("graph", sorted(seeds.values()), inputs, outputs)
    return result


def _pass_down(
    graph: GraphProto,
    nodes: list[NodeProto],
    tensors: Mapping[str, TensorProto],
    outer: Mapping[str, _Value],
    seeds: Mapping[int, Colour],
) -> tuple[list[_Vertex], dict[str, tuple[int, int]]]:
    """Colours from the ancestors: inputs, initialisers, then nodes, in this order of vertices."""
    values = dict(outer)
    origin: dict[str, tuple[int, int]] = {}
    vertices: list[_Vertex] = []
    inputs = [value for value in graph.input if value.name not in tensors]
    for index, value in enumerate(inputs):
        colour = _hash("input", index, _type_of(value), seeds.get(len(vertices), b""))
        values[value.name] = _Value(colour, weighted=False)
        origin[value.name] = (len(vertices), 0)
        vertices.append(_Vertex(colour))
    steering = _steering(graph, nodes, tensors, values)
    for name, tensor in tensors.items():
        content = _content(tensor) if name in steering else b""
        colour = _hash(
            "constant",
            tensor.data_type,
            list(tensor.dims),
            content,
            seeds.get(len(vertices), b""),
        )
        values[name] = _Value(colour, weighted=False)
        origin[name] = (len(vertices), 0)
        vertices.append(_Vertex(colour))
    for node in nodes:
        read = [values[name].colour if name else b"" for name in _trimmed(node.input)]
        attributes = sorted(_attribute(attribute, values) for attribute in node.attribute)
        outputs = [bool(name) for name in _trimmed(node.output)]
        seed = seeds.get(len(vertices), b"")
        colour = _hash("node", _domain(node.domain), node.op_type, attributes, read, outputs, seed)
        weighted = _is_weighted(node, values)
        for slot, name in enumerate(node.output):
            values[name] = _Value(_hash(colour, slot), weighted)
            origin[name] = (len(vertices), slot)
        vertices.append(_Vertex(colour))
    return vertices, origin


def _note_uses(
    graph: GraphProto,
    nodes: list[NodeProto],
    vertices: list[_Vertex],
    origin: Mapping[str, tuple[int, int]],
) -> None:
    first = len(vertices) - len(nodes)
    for index, node in enumerate(nodes):
        reads = list(enumerate(node.input)) + [(-1, name) for name in sorted(_free(node))]
        for position, name in reads:
            if name in origin:
                vertex, slot = origin[name]
                vertices[vertex].uses.append((slot, first + index, position))
    for position, value in enumerate(graph.output):
        if value.name in origin:
            vertex, slot = origin[value.name]
            vertices[vertex].uses.append((slot, -1, position))


def _pass_up(vertices: list[_Vertex]) -> None:
    """Colours from the users. Users come after what they use, so one pass from the end suffices."""
    for vertex in reversed(vertices):
        vertex.below = _hash(
            sorted(
                _hash(slot, position, *_user_colour(vertices, user))
                for slot, user, position in vertex.uses
            )
        )


def _user_colour(vertices: list[_Vertex], user: int) -> tuple[Colour, Colour]:
    return (b"output", b"") if user < 0 else (vertices[user].above, vertices[user].below)


def _position(
    name: str,
    origin: Mapping[str, tuple[int, int]],
    seeds: Mapping[int, Colour],
    outer: Mapping[str, _Value],
) -> tuple[Colour, int]:
    if name in origin:
        vertex, slot = origin[name]
        return seeds[vertex], slot
    return outer[name].colour, 0


def _steering(
    graph: GraphProto,
    nodes: list[NodeProto],
    tensors: Mapping[str, TensorProto],
    values: Mapping[str, _Value],
) -> set[str]:
    """Names of the constants whose values count."""
    weighted = {name: value.weighted for name, value in values.items()}
    # Values that depend on what the graph is given, and not only on its shape.
    fed = set(values) - set(tensors)
    for node in nodes:
        after = _after_weighted(node, weighted)
        weighted.update(dict.fromkeys(node.output, after))
        if node.op_type not in MEASURING and (_free(node) or not fed.isdisjoint(node.input)):
            fed.update(node.output)
    weights: set[str] = set()
    early = {value.name for value in graph.output}
    # From the end: what is computed only from constants steers where its result does.
    for node in reversed(nodes):
        after = _after_weighted(node, weighted)
        joins = not fed.isdisjoint(node.output) or not early.isdisjoint(node.output)
        for position, name in enumerate(node.input):
            if node.op_type in WEIGHTED and (position > 0 or node.op_type == "DequantizeLinear"):
                weights.add(name)
            elif (joins and not after) or (node.op_type in RESIZING and position > 0):
                early.add(name)
        # What a body reads is not followed into the body: count it rather than miss it.
        early.update(_free(node))
    return {
        name
        for name, tensor in tensors.items()
        if name not in weights and (_is_discrete(tensor) or not tensor.dims or name in early)
    }


def _after_weighted(node: NodeProto, weighted: Mapping[str, bool]) -> bool:
    return node.op_type in WEIGHTED or any(weighted.get(name, False) for name in node.input)


def _is_weighted(node: NodeProto, values: Mapping[str, _Value]) -> bool:
    return node.op_type in WEIGHTED or any(values[n].weighted for n in node.input if n)


def _is_discrete(tensor: TensorProto) -> bool:
    kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).kind
    return kind in "iubOSU"


def _attribute(attribute: AttributeProto, values: Mapping[str, _Value]) -> Colour:
    """Name, type and value. Bodies are coloured in the light of the values they may read."""
    kind = attribute.type
    if kind in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
        graphs = [attribute.g] if kind == AttributeProto.GRAPH else list(attribute.graphs)
        content: object = [_colour_graph(graph, values) for graph in graphs]
    elif kind in (AttributeProto.TENSOR, AttributeProto.TENSORS):
        tensors = [attribute.t] if kind == AttributeProto.TENSOR else list(attribute.tensors)
        content = [_hash(t.data_type, list(t.dims), _content(t)) for t in tensors]
    else:
        bare = AttributeProto()
        bare.CopyFrom(attribute)
        bare.ClearField("doc_string")
        content = bare.SerializeToString(deterministic=True)
    return _hash(attribute.name, int(kind), content)


def _content(tensor: TensorProto) -> bytes:
    array = onnx.numpy_helper.to_array(tensor)
    return repr(array.tolist()).encode() if array.dtype.kind == "O" else array.tobytes()


def _type_of(value: ValueInfoProto) -> Colour:
    """Dtype and shape; a dynamic axis counts as dynamic, whatever its name."""
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type"):
        return _hash(value.type.WhichOneof("value") or "untyped")
    if not tensor.HasField("shape"):
        return _hash(tensor.elem_type, "any rank")
    dims = [d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim]
    return _hash(tensor.elem_type, dims)


def _constants(graph: GraphProto) -> Iterable[TensorProto]:
    """Initialisers, and Constant nodes as if they were initialisers."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        values = onnx.numpy_helper.to_array(sparse.values)
        where = onnx.numpy_helper.to_array(sparse.indices)
        dense = np.zeros(tuple(sparse.dims), values.dtype)
        if where.ndim == 1:
            dense.flat[where] = values
        else:
            dense[tuple(where.T)] = values
        yield onnx.numpy_helper.from_array(dense, sparse.values.name)
    for node in graph.node:
        if _is_constant(node):
            yield _constant_tensor(node)


def _domain(domain: str) -> str:
    """ONNX's own operators can be written with an empty domain or a named one."""
    return domain or "ai.onnx"


def _is_constant(node: NodeProto) -> bool:
    return node.op_type == "Constant" and node.domain in ("", "ai.onnx")


def _constant_tensor(node: NodeProto) -> TensorProto:
    value = node.attribute[0]
    name = node.output[0]
    if value.type == AttributeProto.TENSOR:
        tensor = TensorProto()
        tensor.CopyFrom(value.t)
        tensor.name = name
        return tensor
    content = onnx.helper.get_attribute_value(value)
    kinds = {
        AttributeProto.FLOAT: TensorProto.FLOAT,
        AttributeProto.FLOATS: TensorProto.FLOAT,
        AttributeProto.INT: TensorProto.INT64,
        AttributeProto.INTS: TensorProto.INT64,
    }
    kind = kinds.get(value.type, TensorProto.STRING)
    listed = list(content) if isinstance(content, list | tuple) else [content]
    dims = [len(listed)] if isinstance(content, list | tuple) else []
    return onnx.helper.make_tensor(name, kind, dims, listed)


def _in_order(graph: GraphProto) -> list[NodeProto]:
    """The nodes, each after what it reads, whatever order the file has."""
    maker = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    order: list[int] = []
    state = [0] * len(graph.node)
    for start in range(len(graph.node)):
        stack = [start]
        while stack:
            index = stack[-1]
            if state[index]:
                stack.pop()
                if state[index] == 1:
                    state[index] = 2
                    order.append(index)
                continue
            state[index] = 1
            node = graph.node[index]
            reads = (maker[name] for name in (*node.input, *_free(node)) if name in maker)
            stack.extend(i for i in reads if state[i] == 0)
    return [graph.node[i] for i in order]


def _free(node: NodeProto) -> set[str]:
    """Names that the node's bodies may read from outside."""
    names: set[str] = set()
    for attribute in node.attribute:
        graphs = [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs
        for graph in graphs:
            own = {value.name for value in graph.input} | {t.name for t in graph.initializer}
            own |= {name for inner in graph.node for name in inner.output}
            reads = {name for inner in graph.node for name in (*inner.input, *_free(inner))}
            names |= (reads | {value.name for value in graph.output}) - own - {""}
    return names


def _trimmed(names: Iterable[str]) -> list[str]:
    """Without trailing empty names: an absent last operand can be written in two ways."""
    kept = list(names)
    while kept and not kept[-1]:
        kept.pop()
    return kept


def _from_function(function: onnx.FunctionProto) -> GraphProto:
    graph = GraphProto()
    graph.node.extend(function.node)
    graph.input.extend(ValueInfoProto(name=name) for name in function.input)
    graph.output.extend(ValueInfoProto(name=name) for name in function.output)
    return graph


def _hash(*parts: object) -> Colour:
    """SHA-256 over parts with their types and lengths, so that no two lists of parts read alike."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, bytes):
            content, kind = part, b"b"
        elif isinstance(part, list | tuple):
            content, kind = _hash(*part), b"l"
        else:
            content, kind = repr(part).encode(), b"r"
        digest.update(kind + len(content).to_bytes(8, "big") + content)
    return digest.digest()
