"""Two oracles of graph identity, and networkx as a third opinion, on small random graphs."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import networkx
import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from srdeploy.export.digest import graph_digest
from srdeploy.export.isomorphism import compare_graphs

FLOAT = TensorProto.FLOAT
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Op:
    """One node of a random graph: it reads values by their index; 0 is the input."""

    kind: str
    reads: tuple[int, ...]
    axis: int = 0
    weight: int | None = None
    """Which of the shared weights it reads too."""


def build(ops: tuple[Op, ...], shuffle: int | None = None) -> ModelProto:
    """A model of `ops`; `shuffle` is a seed for other names and another order of nodes."""
    chance = random.Random(shuffle)
    name = {0: "x"}
    nodes: list[NodeProto] = []
    weights: dict[int, str] = {}
    used: set[int] = set()
    for index, op in enumerate(ops, 1):
        name[index] = f"v{index}" if shuffle is None else f"v{chance.random()}"
        reads = [name[i] for i in op.reads]
        used.update(op.reads)
        if op.weight is not None:
            reads.append(weights.setdefault(op.weight, f"w{op.weight}{shuffle or ''}"))
        node = helper.make_node(op.kind, reads, [name[index]], name[index])
        if op.kind == "Concat":
            node.attribute.append(helper.make_attribute("axis", op.axis))
        nodes.append(node)
    if shuffle is not None:
        nodes = _shuffled(nodes, chance)
    tensors = [
        numpy_helper.from_array(np.full((2, 2), i, np.float32), label)
        for i, label in weights.items()
    ]
    # Every value that nobody reads is an output, in the order of the nodes: nothing is dead.
    ends = [i for i in range(1, len(ops) + 1) if i not in used]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, ["N", 2])],
        [helper.make_tensor_value_info(name[i], FLOAT, None) for i in ends],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def _shuffled(nodes: list[NodeProto], chance: random.Random) -> list[NodeProto]:
    """Another topological order."""
    waiting, order = list(nodes), list[NodeProto]()
    while waiting:
        pending = {name for node in waiting for name in node.output}
        ready = [node for node in waiting if pending.isdisjoint(node.input)]
        order.append(chance.choice(ready))
        waiting.remove(order[-1])
    return order


@st.composite
def programs(draw: st.DrawFn) -> tuple[Op, ...]:
    ops = []
    for index in range(draw(st.integers(1, 7))):
        value = st.integers(max(0, index - 3), index)
        kind = draw(st.sampled_from(["Relu", "Add", "Concat", "MatMul"]))
        weight = draw(st.integers(0, 2)) if kind == "MatMul" else None
        reads = (draw(value), draw(value)) if kind in ("Add", "Concat") else (draw(value),)
        ops.append(Op(kind, reads, draw(st.integers(0, 1)), weight))
    return tuple(ops)


def third_opinion(a: ModelProto, b: ModelProto) -> bool:
    """networkx's VF2 on the same graphs, every property as a label."""
    return bool(
        networkx.is_isomorphic(
            _as_networkx(a),
            _as_networkx(b),
            node_match=lambda x, y: x["label"] == y["label"],
            edge_match=lambda x, y: x["places"] == y["places"],
        )
    )


def _as_networkx(model: ModelProto) -> "networkx.DiGraph[str]":
    graph: networkx.DiGraph[str] = networkx.DiGraph()
    for tensor in model.graph.initializer:
        graph.add_node(tensor.name, label=f"weight {list(tensor.dims)}")
    graph.add_node("x", label="input")
    for node in model.graph.node:
        attributes = [(a.name, a.i) for a in node.attribute]
        graph.add_node(node.output[0], label=f"{node.op_type} {attributes}")
    edges: dict[tuple[str, str], list[int]] = {}
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            edges.setdefault((name, node.output[0]), []).append(place)
    for place, value in enumerate(model.graph.output):
        graph.add_node(f"output {place}", label=f"output {place}")
        edges[value.name, f"output {place}"] = [place]
    for (source, target), places in edges.items():
        graph.add_edge(source, target, places=tuple(places))
    return graph


@settings(max_examples=60, deadline=None)
@given(programs(), st.integers(1, 1000))
def test_other_names_and_another_order_of_nodes_change_nothing(
    program: tuple[Op, ...], seed: int
) -> None:
    a, b = build(program), build(program, shuffle=seed)
    assert graph_digest(a) == graph_digest(b)
    assert compare_graphs(a, b), compare_graphs(a, b).first_difference


@settings(max_examples=150, deadline=None)
@given(programs(), st.data())
def test_both_oracles_judge_an_edited_graph_as_networkx_does(
    program: tuple[Op, ...], data: st.DataObject
) -> None:
    index = data.draw(st.integers(0, len(program) - 1))
    op = program[index]
    edits = [replace(op, axis=1 - op.axis), replace(op, reads=op.reads[::-1])]
    edits.append(replace(op, reads=(data.draw(st.integers(0, index)), *op.reads[1:])))
    if op.weight is not None:
        edits.append(replace(op, weight=(op.weight + 1) % 3))
    if op.kind in ("Add", "Concat"):
        edits.append(replace(op, kind="Concat" if op.kind == "Add" else "Add"))
    edited = (*program[:index], data.draw(st.sampled_from(edits)), *program[index + 1 :])
    a, b = build(program), build(edited, shuffle=data.draw(st.integers(1, 9)))
    expected = third_opinion(a, b)
    assert (graph_digest(a) == graph_digest(b)) is expected
    comparison = compare_graphs(a, b)
    assert comparison.equal is expected, comparison
    assert (comparison.first_difference is None) is expected


def small(edit: Callable[[ModelProto], None] | None = None) -> ModelProto:
    """images -> (x * scale - shift) -> Conv -> Clip -> Conv -> Reshape; edited in place."""
    tensors: dict[str, Array] = {
        "scale": np.full((3, 1, 1), 0.1, np.float32),
        "w1": np.ones((4, 3, 3, 3), np.float32),
        "w2": np.ones((2, 4, 1, 1), np.float32),
        "b2": np.ones(2, np.float32),
        "six": np.array(6, np.float32),
        "shape": np.array([0, 2, -1], np.int64),
    }
    nodes = [
        helper.make_node("Mul", ["images", "scale"], ["m"], "normalise"),
        helper.make_node("Conv", ["m", "w1"], ["c"], "conv1", strides=[1, 1]),
        helper.make_node("Clip", ["c", "", "six"], ["r"], "relu6"),
        helper.make_node("Conv", ["r", "w2", "b2"], ["d"], "conv2"),
        helper.make_node("Reshape", ["d", "shape"], ["logits"], "flatten"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("images", FLOAT, ["N", 3, "H", "W"])],
        [helper.make_tensor_value_info("logits", FLOAT, ["N", 2, "L"])],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    if edit is not None:
        edit(model)
    return model


def _set(name: str, array: Array) -> Callable[..., None]:
    def edit(model: ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == name)
        tensor.CopyFrom(numpy_helper.from_array(array, name))

    return edit


def _stride(model: ModelProto) -> None:
    model.graph.node[1].attribute[0].ints[1] = 2


def _padding(model: ModelProto) -> None:
    model.graph.node[3].attribute.append(helper.make_attribute("pads", [0, 0, 0, 0]))


def _rename_inner(model: ModelProto) -> None:
    for node in model.graph.node:
        node.name, node.doc_string = f"other {node.name}", "a note"
        node.input[:] = [f"{n}!" if n in "mcrd" and n else n for n in node.input]
        node.output[:] = [f"{n}!" if n in "mcrd" else n for n in node.output]


def _constant_node(model: ModelProto) -> None:
    """The limit of relu6 as a Constant node instead of an initialiser."""
    tensor = next(t for t in model.graph.initializer if t.name == "six")
    model.graph.node.insert(0, helper.make_node("Constant", [], ["six"], value_float=6.0))
    model.graph.initializer.remove(tensor)


def _opset(model: ModelProto) -> None:
    model.opset_import[0].version = 19


def _fixed_height(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 64


def _domain(model: ModelProto) -> None:
    model.graph.node[2].domain = "com.example"


def _half(model: ModelProto) -> None:
    _set("w1", np.ones((4, 3, 3, 3), np.float16))(model)


@pytest.mark.parametrize(
    "edit",
    [
        _set("w1", np.zeros((4, 3, 3, 3), np.float32)),
        _set("b2", np.zeros(2, np.float32)),
        _rename_inner,
        _constant_node,
    ],
    ids=["weights", "biases", "names", "constant-node"],
)
def test_weights_names_and_the_form_of_constants_do_not_count(
    edit: Callable[[ModelProto], None],
) -> None:
    assert graph_digest(small()) == graph_digest(small(edit))
    comparison = compare_graphs(small(), small(edit))
    assert comparison, comparison.first_difference


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (_stride, "node 'conv1' (Conv): attribute strides [1, 1] became [1, 2]"),
        (_padding, "node 'conv2' (Conv): attribute pads absent became [0, 0, 0, 0]"),
        (_set("scale", np.full((3, 1, 1), 0.2, np.float32)), "initialiser 'scale'"),
        (_set("six", np.array(5, np.float32)), "its value [6] became [5]"),
        (_set("shape", np.array([0, 2, 1], np.int64)), "initialiser 'shape' (int64 [3])"),
        (_set("w1", np.ones((4, 3, 5, 5), np.float32)), "(float [4, 3, 5, 5])"),
        (_half, "initialiser 'w1' (float16 [4, 3, 3, 3])"),
        (_opset, "operator set ai.onnx: 20 became 19"),
        (_fixed_height, "input 'images': float [?, 3, ?, ?] became float [?, 3, 64, ?]"),
        (_domain, "node 'relu6' (com.example.Clip)"),
    ],
    ids=["stride", "pads", "mean", "clip", "shape", "kernel", "dtype", "opset", "size", "domain"],
)
def test_every_change_of_the_computation_is_seen_by_both_and_named_by_the_walk(
    edit: Callable[[ModelProto], None], named: str
) -> None:
    assert graph_digest(small()) != graph_digest(small(edit))
    comparison = compare_graphs(small(), small(edit))
    assert not comparison
    assert named in (comparison.first_difference or "")


def _branch(model: ModelProto, first: str, second: str) -> None:
    """Ends in `If`: a body that reads the outer value r, or one with other operators."""

    def body(kind: str) -> GraphProto:
        value = helper.make_tensor_value_info("out", FLOAT, None)
        nodes = [
            helper.make_node(kind, ["r"], ["inner"]),
            helper.make_node("Neg", ["inner"], ["out"]),
        ]
        return helper.make_graph(nodes, "body", [], [value])

    condition = numpy_helper.from_array(np.array(True), "condition")
    model.graph.initializer.append(condition)
    del model.graph.node[3:]
    bodies = {"then_branch": body(first), "else_branch": body(second)}
    model.graph.node.append(helper.make_node("If", ["condition"], ["logits"], "if", **bodies))


def test_bodies_of_control_flow_are_compared_inside() -> None:
    a = small(lambda model: _branch(model, "Relu", "Abs"))
    b = small(lambda model: _branch(model, "Relu", "Abs"))
    c = small(lambda model: _branch(model, "Relu", "Exp"))
    assert graph_digest(a) == graph_digest(b) != graph_digest(c)
    assert compare_graphs(a, b)
    comparison = compare_graphs(a, c)
    assert "(Abs) stands against" in (comparison.first_difference or "")


def test_the_output_of_a_body_may_be_a_value_from_outside_it() -> None:
    def passed_on(name: str) -> Callable[[ModelProto], None]:
        def edit(model: ModelProto) -> None:
            _branch(model, "Relu", "Abs")
            body = next(a for a in model.graph.node[-1].attribute if a.name == "else_branch").g
            del body.node[:]
            body.output[0].name = name

        return edit

    assert compare_graphs(small(passed_on("r")), small(passed_on("r")))
    assert graph_digest(small(passed_on("r"))) != graph_digest(small(passed_on("c")))
    assert not compare_graphs(small(passed_on("r")), small(passed_on("c")))


def _sparse(values: tuple[float, ...], places: tuple[int, ...]) -> Callable[[ModelProto], None]:
    """The scale of the images as a sparse initialiser."""

    def edit(model: ModelProto) -> None:
        (scale,) = [t for t in model.graph.initializer if t.name == "scale"]
        model.graph.initializer.remove(scale)
        model.graph.sparse_initializer.append(
            helper.make_sparse_tensor(
                numpy_helper.from_array(np.array(values, np.float32), "scale"),
                numpy_helper.from_array(np.array(places, np.int64), "places"),
                [3, 1, 1],
            )
        )

    return edit


def test_a_sparse_initialiser_counts_as_the_dense_one_that_it_stands_for() -> None:
    dense = small(_set("scale", np.array([0.5, 0, 2], np.float32).reshape(3, 1, 1)))
    sparse = small(_sparse((0.5, 2), (0, 2)))
    assert graph_digest(dense) == graph_digest(sparse)
    assert compare_graphs(dense, sparse), compare_graphs(dense, sparse).first_difference
    assert compare_graphs(sparse, sparse)
    for other in (_sparse((0.5, 3), (0, 2)), _sparse((0.5, 2), (0, 1))):
        assert graph_digest(sparse) != graph_digest(small(other))
        assert "initialiser 'scale'" in str(compare_graphs(sparse, small(other)).first_difference)


def _resized(model: ModelProto, scales: tuple[float, ...], region: tuple[float, ...]) -> None:
    """Ends in a Resize that takes its scales and its region from initialisers."""
    for name, values in (("scales", scales), ("region", region)):
        model.graph.initializer.append(numpy_helper.from_array(np.array(values, np.float32), name))
    del model.graph.node[4:]
    operands = ["d", "region", "scales"]
    node = helper.make_node("Resize", operands, ["logits"], "resize", mode="linear")
    node.attribute.append(
        helper.make_attribute("coordinate_transformation_mode", "tf_crop_and_resize")
    )
    model.graph.node.append(node)


@pytest.mark.parametrize(
    ("scales", "region", "named"),
    [
        ((1, 1, 4, 4), (0, 0, 0, 0, 1, 1, 1, 1), "initialiser 'scales' (float [4])"),
        ((1, 1, 2, 2), (0, 0, 0, 0, 1, 1, 0.5, 0.5), "initialiser 'region' (float [8])"),
    ],
    ids=["scales", "region"],
)
def test_how_far_and_where_a_resize_samples_counts_though_it_is_a_float_tensor(
    scales: tuple[float, ...], region: tuple[float, ...], named: str
) -> None:
    plain = small(lambda model: _resized(model, (1, 1, 2, 2), (0, 0, 0, 0, 1, 1, 1, 1)))
    other = small(lambda model: _resized(model, scales, region))
    assert graph_digest(plain) != graph_digest(other)
    comparison = compare_graphs(plain, other)
    assert named in (comparison.first_difference or "")


def test_sharing_a_weight_differs_from_having_two() -> None:
    shared, apart = build_chain(["w", "w"]), build_chain(["w", "v"])
    assert graph_digest(shared) != graph_digest(apart)
    assert not compare_graphs(shared, apart)
    assert compare_graphs(apart, build_chain(["a", "b"]))


def build_chain(weights: list[str]) -> ModelProto:
    """One MatMul per weight, in a row."""
    values = [f"v{i}" for i in range(len(weights) + 1)]
    nodes = [
        helper.make_node("MatMul", [values[i], weight], [values[i + 1]])
        for i, weight in enumerate(weights)
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(values[0], FLOAT, ["N", 2])],
        [helper.make_tensor_value_info(values[-1], FLOAT, ["N", 2])],
        [
            numpy_helper.from_array(np.eye(2, dtype=np.float32), name)
            for name in dict.fromkeys(weights)
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def test_dead_parts_count_for_both() -> None:
    def with_dead(model: ModelProto) -> None:
        model.graph.node.append(helper.make_node("Relu", ["c"], ["unused"], "dead"))

    comparison = compare_graphs(small(), small(with_dead))
    assert comparison.survivors == ("node 'dead' (Relu)",)
    assert graph_digest(small()) != graph_digest(small(with_dead))
    assert compare_graphs(small(with_dead), small(with_dead))
    assert "only the first graph has node 'dead'" in str(compare_graphs(small(with_dead), small()))


def test_what_an_exit_mixed_into_the_result_needs_is_named_in_topological_order() -> None:
    def mixed(model: ModelProto) -> None:
        model.graph.initializer.append(
            numpy_helper.from_array(np.ones((2, 4, 1, 1), np.float32), "exit.weight")
        )
        model.graph.node[4].input[0] = "sum"
        model.graph.node.insert(3, helper.make_node("Conv", ["r", "exit.weight"], ["e"], "exit"))
        model.graph.node.insert(5, helper.make_node("Add", ["d", "e"], ["sum"], "mix"))

    onnx.checker.check_model(small(mixed))
    comparison = compare_graphs(small(), small(mixed))
    assert comparison.survivors == (
        "node 'exit' (Conv)",
        "node 'mix' (Add)",
        "initialiser 'exit.weight' (float [2, 4, 1, 1])",
    )


def _with_token(token: float, scale: float, divided: bool = False) -> ModelProto:
    """Images scaled, a convolution, and a learnt token repeated as often as there are images."""
    tensors: dict[str, Array] = {
        "scale": np.full((1, 3, 1, 1), scale, np.float32),
        "kernel": np.ones((4, 3, 1, 1), np.float32),
        "token": np.full((1, 4, 1, 1), token, np.float32),
        "one": np.ones((1, 1, 1, 1), np.float32),
        "tail": np.array([4, 1, 1], np.int64),
    }
    scaled = helper.make_node("Div", ["one", "scale"], ["factor"])
    nodes = [
        *([scaled] if divided else []),
        helper.make_node("Mul", ["x", "factor" if divided else "scale"], ["normal"]),
        helper.make_node("Conv", ["normal", "kernel"], ["maps"]),
        helper.make_node("Shape", ["x"], ["batch"], end=1),
        helper.make_node("Concat", ["batch", "tail"], ["shape"], axis=0),
        helper.make_node("Expand", ["token", "shape"], ["tokens"]),
        helper.make_node("Add", ["maps", "tokens"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, ["N", 3, "H", "W"])],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [
            numpy_helper.from_array(value, name)
            for name, value in tensors.items()
            if divided or name != "one"
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


@pytest.mark.parametrize("divided", [False, True])
def test_a_learnt_token_is_a_weight_though_no_weight_is_ahead_of_it(divided: bool) -> None:
    one, other = _with_token(0.5, 2.0, divided), _with_token(0.7, 2.0, divided)
    assert graph_digest(one) == graph_digest(other)
    assert compare_graphs(one, other).equal


@pytest.mark.parametrize("divided", [False, True])
def test_what_normalises_the_images_counts_also_where_it_is_computed(divided: bool) -> None:
    one, other = _with_token(0.5, 2.0, divided), _with_token(0.5, 3.0, divided)
    assert graph_digest(one) != graph_digest(other)
    assert not compare_graphs(one, other).equal
