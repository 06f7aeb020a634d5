"""One way to write a graph down: stable names and order, and nothing about the machine that
exported it.
"""

import ast
from collections.abc import Collection, Iterator

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, ValueInfoProto

PRODUCER = "srdeploy"
_SCOPES = "pkg.torch.onnx.name_scopes"
_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm"})


def canonicalise(model: ModelProto, parameters: Collection[str]) -> None:
    """Renames nodes after their modules, constants after their nodes; strips traces and metadata.
    In place.

    `parameters` are the module's parameter and buffer names: initialisers with these names keep
    them. Graph inputs and outputs keep their names too. A node is called e.g.
    "network/backbone/layer1/0/conv1/Conv", its result "network/backbone/layer1/0/conv1/Conv_out".
    The exporter's metadata must still be there.
    """
    model.producer_name, model.producer_version = PRODUCER, ""
    model.ClearField("metadata_props")
    opsets = sorted(model.opset_import, key=lambda opset: opset.domain)
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    names = _Names(parameters)
    names.reserve(value.name for value in (*model.graph.input, *model.graph.output))
    model.graph.name = PRODUCER
    _rename(model.graph, names, {}, "")
    _strip(model.graph)
    for function in model.functions:
        function.ClearField("metadata_props")
        for node in function.node:
            node.ClearField("metadata_props")


class _Names:
    """Hands out names, each once."""

    def __init__(self, parameters: Collection[str]) -> None:
        self.parameters = frozenset(parameters)
        self._taken: set[str] = set()

    def reserve(self, names: Iterator[str]) -> None:
        self._taken.update(names)

    def fresh(self, wish: str) -> str:
        name, count = wish, 1
        while name in self._taken:
            name, count = f"{wish}_{count}", count + 1
        self._taken.add(name)
        return name


def _rename(graph: GraphProto, names: _Names, outer: dict[str, str], path: str) -> None:
    """Gives every node and value of `graph` its name; `outer` maps the names of enclosing
    graphs.
    """
    values = dict(outer)
    for value in (*graph.input, *graph.output):
        values[value.name] = value.name if not path else names.fresh(f"{path}/{value.name}")
    constants = {tensor.name for tensor in graph.initializer} - set(values)
    for tensor in graph.initializer:
        if tensor.name in names.parameters and tensor.name not in values:
            values[tensor.name] = names.fresh(tensor.name)
            constants.discard(tensor.name)
    used: list[str] = []
    for node in graph.node:
        node.name = names.fresh(_wish(node, names.parameters, path))
        for index, name in enumerate(node.input):
            if name in constants and name not in values:
                values[name] = names.fresh(_constant_wish(node, index, names.parameters))
            if name:
                node.input[index] = values[name]
                used.append(values[name])
        # Values of enclosing graphs that only a body reads need their name before the body is
        # visited.
        for name in _free_names(node):
            if name in constants and name not in values:
                values[name] = names.fresh(f"{node.name}_const")
            used.append(values.get(name, name))
        for index, name in enumerate(node.output):
            if name and name not in values:
                values[name] = names.fresh(f"{node.name}_out" + (str(index) if index else ""))
            node.output[index] = values[name] if name else ""
        for body in _bodies(node):
            _rename(body, names, values, node.name)
        attributes = sorted(node.attribute, key=lambda attribute: attribute.name)
        del node.attribute[:]
        node.attribute.extend(attributes)
    for value in (*graph.input, *graph.output):
        value.name = values[value.name]
    for tensor in graph.initializer:
        tensor.name = values.get(tensor.name, tensor.name)
    position = {name: index for index, name in reversed(list(enumerate(used)))}
    tensors = sorted(graph.initializer, key=lambda t: (position.get(t.name, len(used)), t.name))
    del graph.initializer[:]
    graph.initializer.extend(tensors)


def _constant_wish(node: NodeProto, index: int, parameters: Collection[str]) -> str:
    """Name of a constant that the module does not name: after the node that reads it first."""
    weight = node.input[1] if node.op_type in _WEIGHTED and index == 2 else ""
    if weight in parameters:
        # Folding BatchNorm into a convolution without a bias made this one: it is that
        # convolution's bias.
        return weight.rpartition(".")[0] + ".bias"
    return f"{node.name}_in{index}"


def _wish(node: NodeProto, parameters: Collection[str], path: str) -> str:
    """module/path/Operator. A weighted operator belongs to the module that owns its weight."""
    scope = _scope(node)
    if node.op_type in _WEIGHTED and len(node.input) > 1 and node.input[1] in parameters:
        scope = node.input[1].rpartition(".")[0]
    parts = [path] if path else []
    return "/".join([*parts, *(part for part in scope.split(".") if part), node.op_type])


def _scope(node: NodeProto) -> str:
    """Dotted path of the deepest module that the exporter recorded for the node; "" for the
    root.
    """
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            scopes: list[str] = ast.literal_eval(entry.value)
            modules = [scope for scope in scopes[:-1] if not scope.startswith("_empty_nn_module")]
            return modules[-1] if modules else ""
    return ""


def _bodies(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def _free_names(node: NodeProto) -> Iterator[str]:
    """Names that the node's bodies read from enclosing graphs, in order of use."""
    for body in _bodies(node):
        own = {value.name for value in body.input} | {t.name for t in body.initializer}
        own |= {name for inner in body.node for name in inner.output}
        for inner in body.node:
            for name in (*inner.input, *_free_names(inner)):
                if name and name not in own:
                    yield name


def _strip(graph: GraphProto) -> None:
    """Removes doc strings, metadata and the shapes of intermediate values, which restate what can
    be inferred.
    """
    graph.ClearField("value_info")
    graph.ClearField("metadata_props")
    graph.doc_string = ""
    for value in (*graph.input, *graph.output):
        _strip_value(value)
    for tensor in graph.initializer:
        tensor.ClearField("metadata_props")
        tensor.ClearField("doc_string")
    for node in graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
        for attribute in node.attribute:
            attribute.ClearField("doc_string")
        for body in _bodies(node):
            _strip(body)


def _strip_value(value: ValueInfoProto) -> None:
    value.ClearField("metadata_props")
    value.ClearField("doc_string")
