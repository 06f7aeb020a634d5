"""The second oracle of identity: two graphs walked side by side from their outputs.

It stands on onnx-ir, shares no code with `digest` and works the other way round: it pairs the
outputs, then their producers, then the operands in order, and requires that the pairing is one to
one. Where the digest only says that two graphs differ, the walk names the node and the difference.

What counts: operators, domains, attributes, operands in order, dtypes and shapes of initialisers,
inputs and outputs, operator sets, and values that steer the computation: integers and booleans,
floats of rank 0, scales and regions of resizes, and whatever is read before the first weighted
operator. Names and weights don't.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class GraphComparison:
    """What `compare_graphs` found; true where the graphs are equal."""

    equal: bool
    first_difference: str | None
    """The first differing node in topological order, with both sides; None where equal."""
    survivors: tuple[str, ...]
    """Nodes, initialisers and outputs of the second graph that the first has no counterpart for, in
    topological order."""

    def __bool__(self) -> bool:
        return self.equal


@dataclass(frozen=True)
class _Difference:
    position: tuple[int, int]
    """(kind, index) in topological order: inputs, then nodes, then what concerns whole graphs."""
    text: str


def compare_graphs(a: ModelProto, b: ModelProto) -> GraphComparison:
    """Compares the plain network's graph `a` with `b`, the one that should be the same."""
    models = [ir.from_proto(_with_dense_initialisers(model)) for model in (a, b)]
    left, right = (_View(model.graph) for model in models)
    walk = _Walk(left, right)
    pairs, differences = _paired_outputs(left, right)
    differences += walk.run(pairs)
    differences += _compare_opsets(*models)
    differences += _compare_inputs(left, right)
    differences += _compare_functions(*models)
    lost, extra = _only_in_one(walk)
    paired = {other for _, other in pairs}
    survivors = [right.label(source) for source in extra]
    survivors += [f"output '{value.name}'" for value in right.outputs if value not in paired]
    lost_labels = [left.label(source) for source in lost]
    for side, only in (("first", lost_labels), ("second", survivors)):
        if only:
            differences.append(_Difference((2, 0), f"only the {side} graph has {only[0]}"))
    differences.sort(key=lambda difference: difference.position)
    return GraphComparison(
        equal=not differences,
        first_difference=differences[0].text if differences else None,
        survivors=tuple(survivors),
    )


class _Walk:
    """Pairs of sources that must be the same, and the values still to be compared."""

    def __init__(self, left: "_View", right: "_View") -> None:
        self.left, self.right = left, right
        self.forth: dict[Source, Source] = {}
        self.back: dict[Source, Source] = {}
        self._waiting: list[tuple[ir.Value, ir.Value]] = []
        self._found: list[_Difference] = []

    def run(self, pairs: Sequence[tuple[ir.Value, ir.Value]]) -> list[_Difference]:
        """Follows the pairs of values upstream and returns what contradicts that they are equal."""
        self._waiting += pairs
        while self._waiting:
            one, other = self._waiting.pop()
            (a, slot_a), (b, slot_b) = self.left.source(one), self.right.source(other)
            if slot_a != slot_b:
                labels = self.left.label(a), self.right.label(b)
                text = f"result {slot_a} of {labels[0]} stands against result {slot_b} of "
                self._differ(b, text + labels[1])
            self._visit(a, b)
        return self._found

    def _visit(self, a: Source, b: Source) -> None:
        label_a, label_b = self.left.label(a), self.right.label(b)
        if a in self.forth or b in self.back:
            if self.forth.get(a) is not b:
                known = a in self.forth
                other = self.right.label(self.forth[a]) if known else self.left.label(self.back[b])
                self._differ(
                    b, f"{label_a} stands against {label_b} here and against {other} elsewhere"
                )
            return
        self.forth[a], self.back[b] = b, a
        kinds = self.left.kind(a), self.right.kind(b)
        if kinds[0] != kinds[1]:
            # Not the same thing at all: neither side has found its counterpart.
            del self.forth[a], self.back[b]
            self._differ(b, f"{label_a} stands against {label_b}")
        elif isinstance(a, ir.Node):
            assert isinstance(b, ir.Node)
            self._compare_nodes(a, b)
        elif isinstance(b, ir.Value) and b in self.right.tensors:
            if self.left.content(a) != self.right.content(b):
                values = _short_values(self.left.tensors[a]), _short_values(self.right.tensors[b])
                self._differ(b, f"{label_b}: its value {values[0]} became {values[1]}")
        elif self.left.position[a] != self.right.position[b]:
            place = f"in place {self.left.position[a]} stands against {label_b} in "
            self._differ(b, f"{label_a} {place}{self.right.position[b]}")

    def _compare_nodes(self, a: ir.Node, b: ir.Node) -> None:
        label = self.right.label(b)
        self._compare_attributes(a, b)
        if _results(a) != _results(b):
            self._differ(b, f"{label}: its results {_results(a)} became {_results(b)}")
        operands_a, operands_b = _operands(a), _operands(b)
        if len(operands_a) != len(operands_b):
            counts = f"{len(operands_a)} operands became {len(operands_b)}"
            self._differ(b, f"{label}: {counts}")
        for place, (one, other) in enumerate(zip(operands_a, operands_b, strict=False)):
            if one is not None and other is not None:
                self._waiting.append((one, other))
            elif one is not None or other is not None:
                side = "second" if one is None else "first"
                self._differ(b, f"{label}: only the {side} graph has operand {place}")

    def _compare_attributes(self, a: ir.Node, b: ir.Node) -> None:
        mine, theirs = _attributes(a), _attributes(b)
        for key in sorted(mine.keys() | theirs.keys()):
            one, other = mine.get(key, "absent"), theirs.get(key, "absent")
            if isinstance(one, ir.Graph) and isinstance(other, ir.Graph):
                if _size(one) != _size(other):
                    self._differ(b, f"{self.right.label(b)}: body {key} has another size")
                    continue
                outputs = self.left.outputs_of[one], self.right.outputs_of[other]
                self._waiting += zip(*outputs, strict=True)
            elif one != other:
                change = f"{_short(one)} became {_short(other)}"
                self._differ(b, f"{self.right.label(b)}: attribute {key} {change}")

    def _differ(self, where: Source, text: str) -> None:
        self._found.append(_Difference((1, self.right.position[where]), text))


def _compare_opsets(a: ir.Model, b: ir.Model) -> Iterator[_Difference]:
    mine, theirs = (
        {domain or "ai.onnx": version for domain, version in model.opset_imports.items()}
        for model in (a, b)
    )
    for domain in sorted(mine.keys() | theirs.keys()):
        if mine.get(domain) != theirs.get(domain):
            text = f"operator set {domain}: {mine.get(domain)} became {theirs.get(domain)}"
            yield _Difference((0, 0), text)


def _compare_inputs(left: "_View", right: "_View") -> Iterator[_Difference]:
    if len(left.inputs) != len(right.inputs):
        names = [", ".join(str(value.name) for value in view.inputs) for view in (left, right)]
        yield _Difference((0, 1), f"inputs {names[0]} became {names[1]}")
        return
    for one, other in zip(left.inputs, right.inputs, strict=True):
        types = _type_text(one), _type_text(other)
        if types[0] != types[1]:
            yield _Difference((0, 2), f"input '{other.name}': {types[0]} became {types[1]}")


def _paired_outputs(
    left: "_View", right: "_View"
) -> tuple[list[tuple[ir.Value, ir.Value]], list[_Difference]]:
    """Outputs that stand for each other: by name where both have it, the others in their order."""
    places = {value.name: place for place, value in enumerate(right.outputs)}
    common = {value.name for value in left.outputs} & places.keys()
    free = iter([value for value in right.outputs if value.name not in common])
    pairs = []
    differences = []
    for place, value in enumerate(left.outputs):
        known = value.name in common
        partner = right.outputs[places[value.name]] if known else next(free, None)
        if partner is None:
            text = f"only the first graph has output '{value.name}'"
            differences.append(_Difference((2, 1), text))
            continue
        pairs.append((value, partner))
        if place != places[partner.name]:
            text = f"output '{partner.name}' moved from place {place} to {places[partner.name]}"
            differences.append(_Difference((2, 2), text))
        types = _type_text(value), _type_text(partner)
        if types[0] != types[1]:
            text = f"output '{partner.name}': {types[0]} became {types[1]}"
            differences.append(_Difference((2, 3), text))
    return pairs, differences


def _compare_functions(a: ir.Model, b: ir.Model) -> Iterator[_Difference]:
    mine, theirs = a.functions, b.functions
    for key in sorted(mine.keys() | theirs.keys()):
        label = f"function {key[0]}.{key[1]}"
        if key not in mine or key not in theirs:
            yield _Difference((2, 4), f"only one graph has {label}")
            continue
        one, other = mine[key], theirs[key]
        sizes = [(_size(f.graph), sorted(f.attributes)) for f in (one, other)]
        if sizes[0] != sizes[1]:
            yield _Difference((2, 4), f"{label}: its inputs, outputs or nodes differ in number")
            continue
        walk = _Walk(_View(one.graph), _View(other.graph))
        pairs = list(zip(walk.left.outputs, walk.right.outputs, strict=True))
        yield from (_Difference((2, 4), f"{label}: {d.text}") for d in walk.run(pairs))


def _only_in_one(walk: _Walk) -> tuple[list[Source], list[Source]]:
    """What has no counterpart on the other side: nodes in topological order, then initialisers.

    Counterparts were paired by the walk (equal downstream), or have equal value numbers (equal
    upstream): together they find exactly the inserted part, wherever it was put in.
    """
    numbers: Numbers = {}
    ours = walk.left.unpaired(walk.forth, numbers)
    theirs = walk.right.unpaired(walk.back, numbers)
    return _surplus(ours, theirs), _surplus(theirs, ours)


def _surplus(
    mine: list[tuple[Source, object]], theirs: list[tuple[Source, object]]
) -> list[Source]:
    stock = Counter(number for _, number in theirs)
    extra: list[Source] = []
    for source, number in mine:
        if stock[number]:
            stock[number] -= 1
        else:
            extra.append(source)
    return extra


class _View:
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
            found[value] = number("input", index, _type_text(value))
        for constant in _constants(graph):
            found[constant] = number("constant", self.content(constant))
        for node in _nodes(graph):
            attributes: list[tuple[str, object]] = []
            for key, content in sorted(_attributes(node).items()):
                if isinstance(content, ir.Graph):
                    self._number(content, numbers, found)
                    outputs = tuple(found[value] for value in self.outputs_of[content])
                    attributes.append((key, outputs))
                else:
                    attributes.append((key, content))
            operands = tuple(-1 if value is None else found[value] for value in _operands(node))
            computed = (_operator(node), tuple(attributes), operands, tuple(_results(node)))
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


def _with_dense_initialisers(model: ModelProto) -> ModelProto:
    """`model`, or a copy where it has sparse initialisers: onnx-ir reads dense ones only."""
    if not any(graph.sparse_initializer for graph in _graphs(model.graph)):
        return model
    dense = ModelProto()
    dense.CopyFrom(model)
    for graph in _graphs(dense.graph):
        graph.initializer.extend(_dense(sparse) for sparse in graph.sparse_initializer)
        graph.ClearField("sparse_initializer")
    return dense


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
            content = attribute.value
            is_tensor = attribute.type == ir.AttributeType.TENSOR
            tensors[node.outputs[0]] = content if is_tensor else _tensor(content)
    return tensors


def _tensor(content: object) -> ir.TensorProtocol:
    """What a Constant node with numbers or strings gives; Python's floats are float32."""
    return ir.tensor(content)  # type: ignore[arg-type]


def _is_constant(node: ir.Node) -> bool:
    return node.op_type == "Constant" and node.domain in ("", "ai.onnx")


def _operator(node: ir.Node) -> str:
    own = node.domain in ("", "ai.onnx")
    return node.op_type if own else f"{node.domain}.{node.op_type}"


def _operands(node: ir.Node) -> list[ir.Value | None]:
    """None for an absent operand, none at the end."""
    operands = list(node.inputs)
    while operands and operands[-1] is None:
        operands.pop()
    return operands


def _results(node: ir.Node) -> list[bool]:
    """Which results the node gives."""
    results = [bool(value.name) for value in node.outputs]
    while results and not results[-1]:
        results.pop()
    return results


def _bodies(node: ir.Node) -> Iterator[ir.Graph]:
    return (value for value in _attributes(node).values() if isinstance(value, ir.Graph))


def _attributes(node: ir.Node) -> dict[str, str | ir.Graph]:
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
            found[name] = (
                str(list(value))
                if isinstance(value, Sequence | tuple) and not isinstance(value, str)
                else str(value)
            )
    return found


def _size(graph: ir.Graph) -> tuple[int, ...]:
    return (len(_inputs(graph)), len(graph.outputs), len(_nodes(graph)))


def _type_text(value: ir.Value) -> str:
    """Dtype and shape of an input or output; ? for a dynamic axis."""
    if not isinstance(value.type, ir.TensorType):
        return "untyped" if value.type is None else repr(value.type)
    dtype = value.type.dtype.name.lower()
    if value.shape is None:
        return f"{dtype} of any rank"
    dims = [str(dim) if isinstance(dim, int) else "?" for dim in value.shape]
    return f"{dtype} [{', '.join(dims)}]"


def _short_values(tensor: ir.TensorProtocol, shown: int = 4) -> str:
    """The first values of a constant, for messages."""
    flat: npt.NDArray[np.generic] = tensor.numpy().ravel()
    text = ", ".join(f"{v:.6g}" if flat.dtype.kind == "f" else str(v) for v in flat[:shown])
    return f"[{text}{', ...' if flat.size > shown else ''}]"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
