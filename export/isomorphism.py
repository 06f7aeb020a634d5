"""The second oracle of identity: two graphs walked side by side from their outputs.

It shares no code with `digest` and works the other way round: it pairs the outputs, then what makes
them, then their operands in order, and requires that the pairing is one to one. Where the digest
only says that two graphs differ, the walk names the node and what is different about it.

What counts: operators, domains, attributes, operands in order, dtypes and shapes of initialisers,
inputs and outputs, operator sets, and values that steer the computation: integers and booleans,
floats of rank 0, scales and regions of resizes, and whatever is read before the first weighted
operator. Names and weights don't.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from onnx import ModelProto

from srdeploy.export.graph_view import (
    Constant,
    GraphView,
    Input,
    Made,
    Numbers,
    Source,
    short_values,
    view_of,
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
    walk = _Walk()
    left, right = view_of(a.graph), view_of(b.graph)
    pairs, differences = _paired_outputs(left, right)
    for name_a, name_b in pairs:
        walk.pair(left, name_a, right, name_b)
    differences += walk.run()
    differences += _compare_opsets(a, b)
    differences += _compare_inputs(left, right)
    differences += _compare_functions(a, b)
    lost, extra = _only_in_one(left, right, walk)
    paired = {name for _, name in pairs}
    survivors = [str(source) for source in extra]
    survivors += [f"output '{name}'" for name in right.outputs if name not in paired]
    for side, only in (("first", [str(source) for source in lost]), ("second", survivors)):
        if only:
            differences.append(_Difference((2, 0), f"only the {side} graph has {only[0]}"))
    differences.sort(key=lambda difference: difference.position)
    return GraphComparison(
        equal=not differences,
        first_difference=differences[0].text if differences else None,
        survivors=tuple(survivors),
    )


class _Walk:
    """Pairs of sources that must be the same thing, and the values still to be looked at."""

    def __init__(self) -> None:
        self.forth: dict[Source, Source] = {}
        self.back: dict[Source, Source] = {}
        self._waiting: list[tuple[GraphView, str, GraphView, str]] = []
        self._found: list[_Difference] = []

    def pair(self, left: GraphView, name_a: str, right: GraphView, name_b: str) -> None:
        """Demands that the two values are the same."""
        self._waiting.append((left, name_a, right, name_b))

    def run(self) -> list[_Difference]:
        """Follows every demand upstream and returns what contradicts one."""
        while self._waiting:
            left, name_a, right, name_b = self._waiting.pop()
            (a, slot_a), (b, slot_b) = left.source(name_a), right.source(name_b)
            if slot_a != slot_b:
                self._differ(b, f"result {slot_a} of {a} stands against result {slot_b} of {b}")
            self._visit(a, b)
        return self._found

    def _visit(self, a: Source, b: Source) -> None:
        if a in self.forth or b in self.back:
            if self.forth.get(a) is not b:
                other = self.forth[a] if a in self.forth else self.back[b]
                self._differ(b, f"{a} stands against {b} here and against {other} elsewhere")
            return
        self.forth[a], self.back[b] = b, a
        if isinstance(a, Made) and isinstance(b, Made) and a.operator == b.operator:
            self._compare_nodes(a, b)
        elif isinstance(a, Constant) and isinstance(b, Constant) and _kind(a) == _kind(b):
            if a.key() != b.key():
                values = f"{short_values(a)} became {short_values(b)}"
                self._differ(b, f"{b}: its value {values}")
        elif isinstance(a, Input) and isinstance(b, Input):
            if a.position != b.position:
                self._differ(b, f"{a} in place {a.position} stands against {b} in {b.position}")
        else:
            # Not the same thing at all: neither side has found its counterpart.
            del self.forth[a], self.back[b]
            self._differ(b, f"{a} stands against {b}")

    def _compare_nodes(self, a: Made, b: Made) -> None:
        self._compare_attributes(a, b)
        if a.results != b.results:
            self._differ(b, f"{b}: its results {a.results} became {b.results}")
        if len(a.operands) != len(b.operands):
            counts = f"{len(a.operands)} operands became {len(b.operands)}"
            self._differ(b, f"{b}: {counts}")
        for place, (name_a, name_b) in enumerate(zip(a.operands, b.operands, strict=False)):
            if name_a and name_b:
                self.pair(a.view, name_a, b.view, name_b)
            elif name_a or name_b:
                side = "first" if name_a else "second"
                self._differ(b, f"{b}: operand {place} is in the {side} graph alone")

    def _compare_attributes(self, a: Made, b: Made) -> None:
        mine, theirs = a.attributes(), b.attributes()
        for key in sorted(mine.keys() | theirs.keys()):
            left, right = mine.get(key, "absent"), theirs.get(key, "absent")
            if isinstance(left, GraphView) and isinstance(right, GraphView):
                if _size(left) != _size(right):
                    self._differ(b, f"{b}: body {key} has another size")
                    continue
                for name_a, name_b in zip(left.outputs, right.outputs, strict=True):
                    self.pair(left, name_a, right, name_b)
            elif left != right:
                self._differ(b, f"{b}: attribute {key} {_short(left)} became {_short(right)}")

    def _differ(self, where: Source, text: str) -> None:
        self._found.append(_Difference((1, where.position), text))


def _kind(constant: Constant) -> tuple[object, ...]:
    return (constant.dtype, constant.shape, constant.steers)


def _size(view: GraphView) -> tuple[int, ...]:
    return (len(view.inputs), len(view.outputs), len(view.nodes))


def _compare_opsets(a: ModelProto, b: ModelProto) -> Iterator[_Difference]:
    mine = {opset.domain or "ai.onnx": opset.version for opset in a.opset_import}
    theirs = {opset.domain or "ai.onnx": opset.version for opset in b.opset_import}
    for domain in sorted(mine.keys() | theirs.keys()):
        if mine.get(domain) != theirs.get(domain):
            text = f"operator set {domain}: {mine.get(domain)} became {theirs.get(domain)}"
            yield _Difference((0, 0), text)


def _compare_inputs(left: GraphView, right: GraphView) -> Iterator[_Difference]:
    if len(left.inputs) != len(right.inputs):
        text = f"inputs {', '.join(left.inputs)} became {', '.join(right.inputs)}"
        yield _Difference((0, 1), text)
        return
    for name_a, name_b in zip(left.inputs, right.inputs, strict=True):
        type_a, type_b = left.value_type(name_a), right.value_type(name_b)
        if type_a != type_b:
            yield _Difference((0, 2), f"input '{name_b}': {type_a} became {type_b}")


def _paired_outputs(
    left: GraphView, right: GraphView
) -> tuple[list[tuple[str, str]], list[_Difference]]:
    """Outputs that stand for each other: by name where both have it, the others in their order."""
    common = set(left.outputs) & set(right.outputs)
    free = iter([name for name in right.outputs if name not in common])
    pairs = []
    differences = []
    for name in left.outputs:
        partner = name if name in common else next(free, None)
        if partner is None:
            text = f"output '{name}' is in the first graph alone"
            differences.append(_Difference((2, 1), text))
            continue
        pairs.append((name, partner))
        places = left.outputs.index(name), right.outputs.index(partner)
        if places[0] != places[1]:
            text = f"output '{partner}' moved from place {places[0]} to {places[1]}"
            differences.append(_Difference((2, 2), text))
        type_a, type_b = left.value_type(name), right.value_type(partner)
        if type_a != type_b:
            text = f"output '{partner}': {type_a} became {type_b}"
            differences.append(_Difference((2, 3), text))
    return pairs, differences


def _compare_functions(a: ModelProto, b: ModelProto) -> Iterator[_Difference]:
    mine = {(f.domain, f.name): f for f in a.functions}
    theirs = {(f.domain, f.name): f for f in b.functions}
    for key in sorted(mine.keys() | theirs.keys()):
        label = f"function {key[0]}.{key[1]}"
        if key not in mine or key not in theirs:
            yield _Difference((2, 4), f"{label} is in one graph alone")
            continue
        left, right = view_of(mine[key]), view_of(theirs[key])
        names = [sorted(function.attribute) for function in (mine[key], theirs[key])]
        if _size(left) != _size(right) or names[0] != names[1]:
            yield _Difference((2, 4), f"{label}: its inputs, outputs or nodes differ in number")
            continue
        walk = _Walk()
        for name_a, name_b in zip(left.outputs, right.outputs, strict=True):
            walk.pair(left, name_a, right, name_b)
        yield from (_Difference((2, 4), f"{label}: {d.text}") for d in walk.run())


def _only_in_one(
    left: GraphView, right: GraphView, walk: _Walk
) -> tuple[list[Source], list[Source]]:
    """What has no counterpart on the other side: nodes in topological order, then initialisers.

    Counterparts were paired by the walk (equal downstream), or have equal value numbers (equal
    upstream): together they find the inserted part alone, wherever it was put in.
    """
    numbers: Numbers = {}
    ours, theirs = _loose(left, walk.forth, numbers), _loose(right, walk.back, numbers)
    return _surplus(ours, theirs), _surplus(theirs, ours)


def _loose(
    view: GraphView, paired: dict[Source, Source], numbers: Numbers
) -> list[tuple[Source, object]]:
    """Nodes and initialisers without a partner, with their value numbers."""
    found = view.numbered(numbers)
    nodes: list[tuple[Source, object]] = [
        (made, tuple(found.get(name, -1) for name in made.node.output)) for made in view.nodes
    ]
    constants: list[tuple[Source, object]] = [(c, found[c.name]) for c in view.constants]
    return [(source, number) for source, number in nodes + constants if source not in paired]


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
