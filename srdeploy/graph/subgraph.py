"""The part of an ONNX model that some of its outputs are computed from, byte for byte.

Two algorithms find that part, so that each checks the other: `ancestors` walks from the kept
outputs upstream; `peeled` takes the whole graph and removes, one by one, what nobody reads. What is
kept stays as it was: nodes, names, attributes, weights, order and metadata.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

from onnx import (
    AttributeProto,
    FunctionProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
)

from srdeploy.graph.index import GraphIndex, bodies_of, captured_by
from srdeploy.graph.signature import is_weight

FunctionKey: TypeAlias = tuple[str, str, str]
"""Domain, name and overload of a model-local function."""


@dataclass(frozen=True)
class Part:
    """What of a model's main graph stays: positions of nodes, and names of everything else."""

    nodes: frozenset[int]
    values: frozenset[str]
    """Inputs, initialisers and results of nodes."""
    functions: frozenset[FunctionKey]


@dataclass(frozen=True)
class Size:
    """How much a model, or a part of one, is."""

    nodes: int
    """In bodies of If, Loop and Scan too; a model-local function counts where it is defined."""
    parameters: int
    """Values of stored tensors, integers that are shapes or indices left out."""
    bytes: int
    """As stored, without what belongs to the model as a whole."""

    def __sub__(self, other: "Size") -> "Size":
        return Size(
            self.nodes - other.nodes,
            self.parameters - other.parameters,
            self.bytes - other.bytes,
        )


def ancestors(model: ModelProto, keep: Collection[str]) -> Part:
    """The part of `model` that the outputs `keep` need, found from them upstream."""
    graph = model.graph
    producer = GraphIndex(graph).producer
    nodes: set[int] = set()
    values: set[str] = set()
    waiting = list(keep)
    while waiting:
        name = waiting.pop()
        if name in values:
            continue
        values.add(name)
        index = producer.get(name)
        if index is not None and index not in nodes:
            nodes.add(index)
            node = graph.node[index]
            values.update(other for other in node.output if other)
            waiting.extend(other for other in (*node.input, *captured_by(node)) if other)
    for annotation in graph.quantization_annotation:
        if annotation.tensor_name in values:
            values.update(entry.value for entry in annotation.quant_parameter_tensor_names)
    called = _called(model.functions, [graph.node[index] for index in nodes])
    return Part(frozenset(nodes), frozenset(values), called)


def peeled(model: ModelProto, keep: Collection[str]) -> Part:
    """The same part, found the other way round: nodes that nobody reads go, until none is left."""
    graph = model.graph
    reads = [list(_reads_outside(node)) for node in graph.node]
    uses: Counter[str] = Counter(keep)
    for names in reads:
        uses.update(names)
    producer = {name: i for i, node in enumerate(graph.node) for name in node.output}
    alive = set(range(len(graph.node)))
    doomed = [i for i, node in enumerate(graph.node) if not any(uses[n] for n in node.output)]
    while doomed:
        index = doomed.pop()
        if index not in alive:
            continue
        alive.remove(index)
        for name in reads[index]:
            uses[name] -= 1
            if not uses[name] and name in producer:
                above = graph.node[producer[name]]
                if not any(uses[other] for other in above.output):
                    doomed.append(producer[name])
    values = {name for name, count in uses.items() if count}
    values.update(name for index in alive for name in graph.node[index].output if name)
    scales = [
        entry.value
        for annotation in graph.quantization_annotation
        if annotation.tensor_name in values
        for entry in annotation.quant_parameter_tensor_names
    ]
    functions = _without_uncalled(model, alive)
    return Part(frozenset(alive), frozenset(values.union(scales)), functions)


def restricted(model: ModelProto, part: Part, keep: Collection[str]) -> ModelProto:
    """A copy of `model` that only holds `part`, with the outputs `keep` in the model's order.

    Operator sets and metadata stay as they are, also where only removed nodes used them. How to
    train the model (training_info) is no part of what an output is computed from, and goes.
    """
    rest = ModelProto()
    rest.CopyFrom(model)
    rest.ClearField("training_info")
    _retain(rest.functions, [f for f in rest.functions if function_key(f) in part.functions])
    graph, values = rest.graph, part.values
    _retain(graph.node, [node for i, node in enumerate(graph.node) if i in part.nodes])
    _retain(graph.initializer, [t for t in graph.initializer if t.name in values])
    _retain(
        graph.sparse_initializer, [t for t in graph.sparse_initializer if t.values.name in values]
    )
    _retain(graph.input, [value for value in graph.input if value.name in values])
    _retain(graph.output, [value for value in graph.output if value.name in keep])
    _retain(graph.value_info, [value for value in graph.value_info if value.name in values])
    _retain(
        graph.quantization_annotation,
        [note for note in graph.quantization_annotation if note.tensor_name in values],
    )
    return rest


def size_of(model: ModelProto, part: Part | None = None) -> Size:
    """How much `part` of `model` is; all of it by default."""
    graph = model.graph
    stored = [t for t in graph.initializer if part is None or t.name in part.values]
    sparse = [t for t in graph.sparse_initializer if part is None or t.values.name in part.values]
    nodes = [node for i, node in enumerate(graph.node) if part is None or i in part.nodes]
    functions = [
        function
        for function in model.functions
        if part is None or function_key(function) in part.functions
    ]
    inside = [node for function in functions for node in function.node]
    every = [node for top in (*nodes, *inside) for node in _with_nested(top)]
    tensors = [*stored, *(one.values for one in sparse)]
    tensors += [tensor for top in (*nodes, *inside) for tensor in _tensors_within(top)]
    whole: list[Any] = [*stored, *sparse, *nodes, *functions]
    return Size(
        nodes=len(every),
        parameters=sum(prod(tensor.dims) for tensor in tensors if is_weight(tensor)),
        bytes=sum(message.ByteSize() for message in whole),
    )


def every_tensor(model: ModelProto) -> Iterator[TensorProto]:
    """All stored tensors: initialisers, and those in attributes, bodies and functions."""
    yield from model.graph.initializer
    for sparse in model.graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for function in model.functions:
        for node in function.node:
            yield from _tensors_within(node)
    for node in model.graph.node:
        yield from _tensors_within(node)


def real_inputs(model: ModelProto) -> list[ValueInfoProto]:
    """The inputs that must be fed: old files list initialisers as inputs too."""
    stored = {tensor.name for tensor in model.graph.initializer}
    stored |= {tensor.values.name for tensor in model.graph.sparse_initializer}
    return [value for value in model.graph.input if value.name not in stored]


def function_key(function: FunctionProto) -> FunctionKey:
    """What nodes call the function by."""
    return function.domain, function.name, function.overload


def _retain(field: Any, kept: Sequence[Any]) -> None:
    """Sets a repeated field to messages that it holds; unchanged where all of them stay."""
    if len(kept) != len(field):
        del field[:]
        field.extend(kept)


def _called(
    functions: Iterable[FunctionProto], nodes: Iterable[NodeProto]
) -> frozenset[FunctionKey]:
    """The functions that `nodes` call, and those that these call in turn."""
    known = {function_key(function): function for function in functions}
    found: set[FunctionKey] = set()
    waiting = list(nodes)
    while waiting and known:
        node = waiting.pop()
        waiting.extend(inner for body in bodies_of(node) for inner in body.node)
        key = (node.domain, node.op_type, node.overload)
        if key in known and key not in found:
            found.add(key)
            waiting.extend(known[key].node)
    return frozenset(found)


def _reads_outside(node: NodeProto, within: tuple[frozenset[str], ...] = ()) -> Iterator[str]:
    """Every use, also repeated, of a name that is not made in one of the bodies around it.

    within: the names that the enclosing bodies make, outermost first.
    """
    for name in node.input:
        if name and not any(name in names for names in within):
            yield name
    for attribute in node.attribute:
        for body in (*attribute.graphs, *((attribute.g,) if attribute.HasField("g") else ())):
            made = frozenset(
                [value.name for value in body.input]
                + [tensor.name for tensor in body.initializer]
                + [tensor.values.name for tensor in body.sparse_initializer]
                + [name for inner in body.node for name in inner.output]
            )
            scopes = (*within, made)
            for inner in body.node:
                yield from _reads_outside(inner, scopes)
            for value in body.output:
                if not any(value.name in names for names in scopes):
                    yield value.name


def _without_uncalled(model: ModelProto, alive: Collection[int]) -> frozenset[FunctionKey]:
    """All functions but those without a caller, removed until none is left."""
    functions = {function_key(function): function for function in model.functions}
    nodes = [model.graph.node[index] for index in alive]
    while functions:
        callers = [*nodes, *(node for function in functions.values() for node in function.node)]
        callers = [node for caller in callers for node in _with_nested(caller)]
        called = {(node.domain, node.op_type, node.overload) for node in callers}
        if called >= functions.keys():
            break
        functions = {key: function for key, function in functions.items() if key in called}
    return frozenset(functions)


def _with_nested(node: NodeProto) -> Iterator[NodeProto]:
    """The node, and all nodes in its bodies."""
    yield node
    for body in bodies_of(node):
        for inner in body.node:
            yield from _with_nested(inner)


def _tensors_within(node: NodeProto) -> Iterator[TensorProto]:
    """Tensors in the attributes of the node, and in its bodies."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.TENSOR:
            yield attribute.t
        yield from attribute.tensors
    for body in bodies_of(node):
        yield from body.initializer
        yield from (tensor.values for tensor in body.sparse_initializer)
        for inner in body.node:
            yield from _tensors_within(inner)
