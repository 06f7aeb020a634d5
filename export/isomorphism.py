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

import onnx_ir as ir
from onnx import ModelProto

from srdeploy.export.graph_view import (
    GraphView,
    Numbers,
    Source,
    attributes_of,
    counts_of,
    operands_of,
    results_of,
    short_values,
    type_text,
    with_dense_initialisers,
)


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
    models = [ir.from_proto(with_dense_initialisers(model)) for model in (a, b)]
    left, right = (GraphView(model.graph) for model in models)
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

    def __init__(self, left: GraphView, right: GraphView) -> None:
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
                values = short_values(self.left.tensors[a]), short_values(self.right.tensors[b])
                self._differ(b, f"{label_b}: its value {values[0]} became {values[1]}")
        elif self.left.position[a] != self.right.position[b]:
            place = f"in place {self.left.position[a]} stands against {label_b} in "
            self._differ(b, f"{label_a} {place}{self.right.position[b]}")

    def _compare_nodes(self, a: ir.Node, b: ir.Node) -> None:
        label = self.right.label(b)
        self._compare_attributes(a, b)
        if results_of(a) != results_of(b):
            self._differ(b, f"{label}: its results {results_of(a)} became {results_of(b)}")
        operands_a, operands_b = operands_of(a), operands_of(b)
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
        mine, theirs = attributes_of(a), attributes_of(b)
        for key in sorted(mine.keys() | theirs.keys()):
            one, other = mine.get(key, "absent"), theirs.get(key, "absent")
            if isinstance(one, ir.Graph) and isinstance(other, ir.Graph):
                if counts_of(one) != counts_of(other):
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


def _compare_inputs(left: GraphView, right: GraphView) -> Iterator[_Difference]:
    if len(left.inputs) != len(right.inputs):
        names = [", ".join(str(value.name) for value in view.inputs) for view in (left, right)]
        yield _Difference((0, 1), f"inputs {names[0]} became {names[1]}")
        return
    for one, other in zip(left.inputs, right.inputs, strict=True):
        types = type_text(one), type_text(other)
        if types[0] != types[1]:
            yield _Difference((0, 2), f"input '{other.name}': {types[0]} became {types[1]}")


def _paired_outputs(
    left: GraphView, right: GraphView
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
        types = type_text(value), type_text(partner)
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
        counts = [(counts_of(f.graph), sorted(f.attributes)) for f in (one, other)]
        if counts[0] != counts[1]:
            yield _Difference((2, 4), f"{label}: its inputs, outputs or nodes differ in number")
            continue
        walk = _Walk(GraphView(one.graph), GraphView(other.graph))
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


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
