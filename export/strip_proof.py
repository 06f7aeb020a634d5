"""The lines of a stripped file's certificate that compare it with the original."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, Self

from google.protobuf.message import Message
from onnx import ModelProto

from srdeploy.export.certificate import Line
from srdeploy.export.digest import graph_digest
from srdeploy.export.isomorphism import compare_graphs
from srdeploy.export.subgraph import function_key, peeled, restricted, size_of
from srdeploy.serve.signature import INPUT_KEY, OUTPUT_KEY, VERSION_KEY
from srdeploy.spec import ONNX_KEY
from srdeploy.validation import Settings

_THINNED = (
    ("node", "initializer", "sparse_initializer", "input", "output")
    + ("value_info", "quantization_annotation")
)  # fmt: skip
"""Fields of a graph that lose entries."""
_OURS = frozenset((ONNX_KEY, INPUT_KEY, OUTPUT_KEY, VERSION_KEY))
_LISTED = 20
"""Survivors that a certificate lists by name; their count is always there."""


class Removed(Settings):
    """What the original has and the stripped file has not."""

    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    nodes: int
    initialisers: int
    functions: int
    parameters: int
    """Values of weights."""
    bytes: int
    """As stored."""

    @classmethod
    def between(cls, original: ModelProto, stripped: ModelProto) -> Self:
        """Counted on both models."""
        size = size_of(original) - size_of(stripped)
        graphs = original.graph, stripped.graph
        outputs = [[value.name for value in graph.output] for graph in graphs]
        inputs = [[value.name for value in graph.input] for graph in graphs]
        tensors = [len(graph.initializer) + len(graph.sparse_initializer) for graph in graphs]
        return cls(
            outputs=tuple(name for name in outputs[0] if name not in outputs[1]),
            inputs=tuple(name for name in inputs[0] if name not in inputs[1]),
            nodes=size.nodes,
            initialisers=tensors[0] - tensors[1],
            functions=len(original.functions) - len(stripped.functions),
            parameters=size.parameters,
            bytes=size.bytes,
        )

    @property
    def nothing(self) -> bool:
        """Whether the stripped file is as large as the original."""
        return not any((self.outputs, self.inputs, self.nodes, self.initialisers, self.functions))

    def __str__(self) -> str:
        if self.nothing:
            return "nothing was there to remove"
        counts = f"{_many(self.nodes, 'node')}, {_many(self.parameters, 'parameter')}"
        outputs = _many(len(self.outputs), "output")
        return f"removed {outputs}, {counts}, {self.bytes / 1e6:.2f} MB"


def identity_line(
    original: ModelProto, stripped: ModelProto, kept: Sequence[str], name: str
) -> Line:
    """Is `stripped`, as read from its file, the part of `original` that `kept` is computed from?

    The part is found a second time by removing what nobody reads, and compared by digest and by
    the walk; then every entry of `stripped` is compared with the original's, byte for byte.
    """
    second = restricted(original, peeled(original, kept), kept)
    digests = graph_digest(second), graph_digest(stripped)
    walk = compare_graphs(second, stripped)
    changed = first_change(original, stripped)
    graph = stripped.graph
    passed = digests[0] == digests[1] and walk.equal and changed is None
    if passed:
        tensors = len(graph.initializer) + len(graph.sparse_initializer)
        detail = (
            f"the part of {name} that {_listed(kept)} needs, found in two ways (digest "
            f"{digests[0][:16]}); {_many(len(graph.node), 'node')} and "
            f"{_many(tensors, 'initialiser')} equal to the original's byte for byte"
        )
    else:
        detail = changed or walk.first_difference or "the digests of two extractions differ"
    return Line(
        name="identity",
        passed=passed,
        detail=detail,
        figures={
            "digest_second_extraction": digests[0],
            "digest_stripped": digests[1],
            "walk_equal": walk.equal,
            "first_difference": walk.first_difference,
            "first_change": changed,
            "nodes": len(graph.node),
        },
    )


def survivors_line(stripped: ModelProto, kept: Sequence[str], removed: Removed) -> Line:
    """Does everything in `stripped` lead to an output of `kept`, and is there no other output?"""
    left = list(_survivors(stripped, kept))
    count = len(left)
    return Line(
        name="survivors",
        passed=not count,
        detail=f"{count} survive, first {left[0]}"
        if count
        else f"nothing that {_listed(kept)} does not need; {removed}",
        figures={
            "count": count,
            "first": left[:_LISTED],
            "removed": removed.model_dump(mode="json"),
        },
    )


def first_change(original: ModelProto, stripped: ModelProto) -> str | None:
    """The first thing in `stripped` that is not in `original` exactly so; None where all is."""
    before, after = _outside(original), _outside(stripped)
    for field in sorted(before.keys() | after.keys()):
        if before.get(field) != after.get(field):
            return f"the model's {field} changed"
    for field in _THINNED:
        stray = _stray(getattr(original.graph, field), getattr(stripped.graph, field))
        if stray is not None:
            return f"{field} '{_name(stray)}' is not the original's"
    if _stray(original.functions, stripped.functions) is not None:
        return "a function is not the original's"
    metadata = [
        [entry for entry in model.metadata_props if entry.key not in _OURS]
        for model in (original, stripped)
    ]
    return "the metadata changed" if metadata[0] != metadata[1] else None


def _survivors(model: ModelProto, kept: Collection[str]) -> Iterator[str]:
    part = peeled(model, kept)
    graph = model.graph
    yield from (f"output '{v.name}'" for v in graph.output if v.name not in kept)
    for index, node in enumerate(graph.node):
        if index not in part.nodes:
            yield f"node '{node.name or next(iter(node.output), '')}' ({node.op_type})"
    tensors = [*graph.initializer, *(sparse.values for sparse in graph.sparse_initializer)]
    yield from (f"initialiser '{t.name}'" for t in tensors if t.name not in part.values)
    yield from (f"input '{v.name}'" for v in graph.input if v.name not in part.values)
    yield from (f"value_info '{v.name}'" for v in graph.value_info if v.name not in part.values)
    yield from (
        f"function '{function.name}'"
        for function in model.functions
        if function_key(function) not in part.functions
    )


def _outside(model: ModelProto) -> dict[str, Any]:
    """What belongs to the model and the graph as a whole, by name."""
    thinned = (*_THINNED, "graph", "functions", "metadata_props", "training_info")
    found = {d.name: value for d, value in model.ListFields() if d.name not in thinned}
    graph = {f"graph.{d.name}": v for d, v in model.graph.ListFields() if d.name not in thinned}
    # What the graph says of itself counts too; only the model's metadata is ours to add to.
    graph["graph.metadata_props"] = list(model.graph.metadata_props)
    return found | graph


def _stray(originals: Iterable[Message], found: Iterable[Message]) -> Message | None:
    """The first of `found` that does not follow in `originals`, in the same order."""
    rest = iter(originals)
    for message in found:
        content = message.SerializeToString(deterministic=True)
        if not any(other.SerializeToString(deterministic=True) == content for other in rest):
            return message
    return None


def _name(message: Any) -> str:
    """Of a node, tensor, value or annotation."""
    for field in ("name", "tensor_name"):
        if getattr(message, field, ""):
            return str(getattr(message, field))
    return str(next(iter(getattr(message, "output", [])), "unnamed"))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
