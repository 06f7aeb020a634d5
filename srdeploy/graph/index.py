"""Producers and consumers of a graph's values, for code that edits protobuf in place."""

from collections import defaultdict
from collections.abc import Iterable, Iterator

from onnx import AttributeProto, GraphProto, NodeProto


class GraphIndex:
    """A graph read once; nodes are given by their position. It does not follow later edits."""

    def __init__(self, graph: GraphProto) -> None:
        self.nodes: list[NodeProto] = list(graph.node)
        self.stored = {tensor.name for tensor in graph.initializer}
        self.stored |= {tensor.values.name for tensor in graph.sparse_initializer}
        self.inputs = {value.name for value in graph.input} - self.stored
        """Inputs that must be fed: old files list initialisers as inputs too."""
        self.outputs = {value.name for value in graph.output}
        self.reads = [reads_of(node) for node in self.nodes]
        """Maps each node to what it reads, itself or in its bodies."""
        self.producer: dict[str, int] = {}
        """Maps each value to the node that produces it."""
        self.uses: dict[str, list[tuple[int, int]]] = defaultdict(list)
        """Maps each value to the (node, operand) of every use outside bodies."""
        self._consumers: dict[str, set[int]] = defaultdict(set)
        for index, node in enumerate(self.nodes):
            self.producer.update((name, index) for name in node.output if name)
            for operand, name in enumerate(node.input):
                self.uses[name].append((index, operand))
            for name in self.reads[index]:
                self._consumers[name].add(index)

    def producer_of(self, name: str) -> NodeProto | None:
        """The node that produces the value; None for inputs and stored tensors."""
        index = self.producer.get(name)
        return None if index is None else self.nodes[index]

    def consumers(self, index: int) -> set[int]:
        """The nodes that read a result of this one, themselves or in their bodies."""
        return {user for name in self.nodes[index].output for user in self._consumers.get(name, ())}

    def gives_output(self, index: int) -> bool:
        """Whether a result of the node is an output of the graph."""
        return not self.outputs.isdisjoint(self.nodes[index].output)


class Names:
    """Hands out names, each once."""

    def __init__(self, taken: Iterable[str]) -> None:
        self._taken = set(taken)

    def fresh(self, wish: str) -> str:
        """`wish`, with a number where it is taken."""
        name, count = wish, 1
        while name in self._taken:
            name, count = f"{wish}_{count}", count + 1
        self._taken.add(name)
        return name


def names_in(graph: GraphProto) -> Iterator[str]:
    """All names of nodes and values in the graph and its bodies."""
    yield from (value.name for value in (*graph.input, *graph.output))
    yield from (tensor.name for tensor in graph.initializer)
    yield from (tensor.values.name for tensor in graph.sparse_initializer)
    for node in graph.node:
        yield from (node.name, *node.output)
        for body in bodies_of(node):
            yield from names_in(body)


def label_of(node: NodeProto) -> str:
    """The node's name; that of its first result where it has none."""
    return node.name or next((name for name in node.output if name), node.op_type)


def bodies_of(node: NodeProto) -> Iterator[GraphProto]:
    """Sub-graphs that the node holds: branches of If, bodies of Loop and Scan."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def captured_by(node: NodeProto) -> list[str]:
    """What the node's bodies take from the graphs around them, in the order of use."""
    names: dict[str, None] = {}
    for body in bodies_of(node):
        own = {value.name for value in body.input} | {t.name for t in body.initializer}
        own |= {t.values.name for t in body.sparse_initializer}
        own |= {name for inner in body.node for name in inner.output}
        inside = [name for inner in body.node for name in reads_of(inner)]
        inside += [value.name for value in body.output]
        names.update(dict.fromkeys(name for name in inside if name not in own))
    return list(names)


def reads_of(node: NodeProto) -> list[str]:
    """What the node reads, itself or in its bodies."""
    return list(dict.fromkeys([*(name for name in node.input if name), *captured_by(node)]))
