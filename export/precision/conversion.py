"""Giving a graph's values, weights and nodes the types that were chosen for them."""

from collections.abc import Collection, Iterator

import onnx
from onnx import GraphProto, NodeProto, TensorProto

from srdeploy.errors import UserError
from srdeploy.export.precision.tensor_types import (
    FLOAT,
    HALF_TYPES,
    LARGEST,
    formals_of,
    in_16_bits,
)
from srdeploy.export.precision.zones import follows_precision
from srdeploy.graph.index import GraphIndex, Names, bodies_of, captured_by, label_of, names_in
from srdeploy.graph.operators import MEASURING
from srdeploy.precision import HalfPrecision


class Conversion:
    """One graph on its way, in place.

    chosen: positions of the nodes that compute in `precision`. types: the element type of each
    value, all float32 where the conversion starts.
    """

    def __init__(
        self,
        graph: GraphProto,
        precision: HalfPrecision,
        chosen: Collection[int],
        types: dict[str, int],
        opset: int,
    ) -> None:
        self.graph, self.precision, self.half = graph, precision, HALF_TYPES[precision]
        self._types = types
        index = GraphIndex(graph)
        self._nodes, self._outputs, self._producer = index.nodes, index.outputs, index.producer
        self._formals = {node: formals_of(self._nodes[node], opset) for node in chosen}
        self._names = Names(names_in(graph))
        self._made_in: dict[str, int] = {}
        """Element type in which a node gives a float value."""
        self._as: dict[tuple[str, int], str] = {}
        """Under which name a float value is there in an element type."""
        self._casts: dict[int, list[NodeProto]] = {}
        """Casts by the node that they come after; -1: at the start."""

    def run(self) -> None:
        for index, node in enumerate(self._nodes):
            self._type_results(index, node)
        self._convert_weights()
        for index, node in enumerate(self._nodes):
            for position, name, element_type in self._float_operands(index, node):
                node.input[position] = self._value_as(name, element_type, node)
            captured = [name for name in captured_by(node) if self._types.get(name) == FLOAT]
            renamed = {name: self._value_as(name, FLOAT, node) for name in captured}
            for body in bodies_of(node):
                _rename_reads(body, renamed)
        for name in self._outputs & self._made_in.keys():
            self._value_as(name, FLOAT, self._nodes[self._producer[name]])
        ordered = list(self._casts.get(-1, []))
        for index, node in enumerate(self._nodes):
            for position, name in enumerate(node.output):
                node.output[position] = (
                    self._as.get((name, self.half), name) if name in self._outputs else name
                )
            ordered += [node, *self._casts.get(index, [])]
        del self.graph.node[:]
        self.graph.node.extend(ordered)
        for value in self.graph.value_info:  # of weights too, where other tools list them
            name = value.name
            as_made = self._made_in.get(name) == self.half and name not in self._outputs
            if as_made or self._as.get((name, self.half)) == name:
                value.type.tensor_type.elem_type = self.half

    def _type_results(self, index: int, node: NodeProto) -> None:
        """Notes in which type each float result is made, and under which name."""
        formals = self._formals.get(index)
        for position, name in enumerate(node.output):
            if not name or self._types[name] != FLOAT:
                continue
            self._made_in[name] = FLOAT
            if formals is not None and follows_precision(
                node, "output", position, formals[1][position], self.half
            ):
                self._made_in[name] = self.half
                if name in self._outputs:  # the output's own name is for what keeps its type
                    self._as[name, self.half] = self._names.fresh(f"{name}/{self.precision}")
                if node.op_type == "Cast":
                    next(a for a in node.attribute if a.name == "to").i = self.half

    def _float_operands(self, index: int, node: NodeProto) -> Iterator[tuple[int, str, int]]:
        """Position, name and needed element type of each operand that was float32.

        What only measures a shape reads the value as it is made.
        """
        if node.op_type in MEASURING:
            return
        formals = self._formals.get(index)
        for position, name in enumerate(node.input):
            if name and self._types[name] == FLOAT:
                follows = formals is not None and follows_precision(
                    node, "input", position, formals[0][position], self.half
                )
                yield position, name, self.half if follows else FLOAT

    def _convert_weights(self) -> None:
        """Stores each weight in the type that its consumers need; in both where they differ."""
        consumers: dict[str, NodeProto] = {}
        in_float = set(self._outputs)
        for index, node in enumerate(self._nodes):
            in_float.update(captured_by(node))
            for _, name, element_type in self._float_operands(index, node):
                if element_type == FLOAT:
                    in_float.add(name)
                else:
                    consumers.setdefault(name, node)
        copies: list[TensorProto] = []
        for tensor in self.graph.initializer:
            if tensor.name not in consumers:
                continue
            half = self._weight_in_16_bits(tensor, consumers[tensor.name])
            if tensor.name in in_float:
                half.name = self._names.fresh(f"{tensor.name}/{self.precision}")
                copies.append(half)
                self._as[tensor.name, self.half] = half.name
            else:
                self._as[tensor.name, self.half] = tensor.name
                tensor.CopyFrom(half)
        self.graph.initializer.extend(copies)

    def _weight_in_16_bits(self, tensor: TensorProto, consumer: NodeProto) -> TensorProto:
        try:
            return in_16_bits(tensor, self.precision)
        except ValueError as error:
            other = " or use --precision bf16" if self.precision == "fp16" else ""
            raise UserError(
                f"initialiser '{tensor.name}' of node '{label_of(consumer)}' holds {error}, beyond "
                f"{self.precision}'s largest value {LARGEST[self.precision]:.6g}: keep the node in "
                f"float32 with --keep '{label_of(consumer)}'" + (f",{other}" if other else "")
            ) from error

    def _value_as(self, name: str, element_type: int, consumer: NodeProto) -> str:
        """The name under which the float value is there in `element_type`; casts it once."""
        if (name, element_type) not in self._as:
            same = self._made_in.get(name, FLOAT) == element_type
            self._as[name, element_type] = (
                name if same else self._cast(name, element_type, consumer)
            )
        return self._as[name, element_type]

    def _cast(self, name: str, element_type: int, consumer: NodeProto) -> str:
        """Casts the value right after it was made; the cast is named after its producer."""
        index = self._producer.get(name, -1)
        label = label_of(self._nodes[index] if index >= 0 else consumer)
        source = self._as.get((name, self.half), name)
        suffix = self.precision if element_type == self.half else "fp32"
        result = name if source != name else self._names.fresh(f"{name}/{suffix}")
        cast = onnx.helper.make_node(
            "Cast", [source], [result], name=self._names.fresh(f"{label}/Cast"), to=element_type
        )
        self._casts.setdefault(index, []).append(cast)
        return result


def _rename_reads(body: GraphProto, renamed: dict[str, str]) -> None:
    """Names that the body takes from around it; ONNX forbids that it makes one of the same name."""
    for node in body.node:
        for position, name in enumerate(node.input):
            node.input[position] = renamed.get(name, name)
        for inner in bodies_of(node):
            _rename_reads(inner, renamed)
    for value in body.output:
        value.name = renamed.get(value.name, value.name)
