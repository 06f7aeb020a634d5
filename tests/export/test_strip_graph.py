"""What an output of an ONNX model needs, found in two ways, in graphs of every kind."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper, parser
from onnx.reference import ReferenceEvaluator
from onnx.utils import Extractor

from srdeploy.export.strip import Removed, first_change, identity_line, survivors_line
from srdeploy.graph.subgraph import ancestors, peeled, restricted, size_of

HEAD = '<ir_version: 9, opset_import: ["" : 20, "own" : 1], producer_name: "tool">'


def model_of(text: str, **weights: tuple[int, ...]) -> ModelProto:
    """A model in ONNX's text form, with random weights of the given shapes."""
    model = parser.parse_model(HEAD + text)
    rng = np.random.default_rng(0)
    for name, shape in weights.items():
        values = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    onnx.checker.check_model(model)
    return model


def stripped(model: ModelProto, *keep: str) -> ModelProto:
    """The part that both algorithms find; it must be a valid model by itself."""
    part = ancestors(model, keep)
    assert part == peeled(model, keep)
    rest = restricted(model, part, keep)
    onnx.checker.check_model(rest, full_check=True)
    assert identity_line(model, rest, keep, "model.onnx").passed
    assert survivors_line(rest, keep, Removed.between(model, rest)).passed
    return rest


def names(model: ModelProto) -> list[str]:
    """First result of each node, in order."""
    return [node.output[0] for node in model.graph.node]


def stored(model: ModelProto) -> set[str]:
    return {tensor.name for tensor in model.graph.initializer}


def two_heads() -> ModelProto:
    return model_of(
        """heads (float[N,3,H,W] images) => (float[N,2,H,W] main, float[N,2,H,W] aux)
        <float[N,4,H,W] features, float[N,4,H,W] side>
        {
          features = Conv(images, stem)
          side = Relu(features)
          aux = Conv(side, aux_head)
          deep = Conv(features, body)
          main = Conv(deep, main_head)
        }""",
        stem=(4, 3, 1, 1),
        aux_head=(2, 4, 1, 1),
        body=(5, 4, 1, 1),
        main_head=(2, 5, 1, 1),
    )


def test_an_auxiliary_head_goes_with_its_nodes_weights_and_value_types() -> None:
    rest = stripped(two_heads(), "main")
    assert names(rest) == ["features", "deep", "main"]
    assert stored(rest) == {"stem", "body", "main_head"}
    assert [value.name for value in rest.graph.output] == ["main"]
    assert [value.name for value in rest.graph.value_info] == ["features"]


def test_what_goes_is_counted() -> None:
    model = two_heads()
    removed = Removed.between(model, stripped(model, "main"))
    assert removed.outputs == ("aux",)
    assert (removed.nodes, removed.initialisers, removed.parameters) == (2, 1, 8)
    assert removed.bytes > 8 * 4
    assert size_of(model).parameters == 12 + 8 + 20 + 10


def test_the_other_head_can_be_kept_instead() -> None:
    rest = stripped(two_heads(), "aux")
    assert names(rest) == ["features", "side", "aux"]
    assert stored(rest) == {"stem", "aux_head"}


def test_everything_that_stays_is_the_originals_byte_for_byte() -> None:
    model = two_heads()
    model.doc_string, model.model_version, model.domain = "whole", 7, "org.tool"
    model.metadata_props.add(key="author", value="someone")
    model.graph.doc_string = "graph"
    for node in model.graph.node:
        node.name, node.doc_string = f"/{node.output[0]}", "where it came from"
        node.metadata_props.add(key="trace", value="line 3")
    rest = stripped(model, "main")
    originals = {node.output[0]: node for node in model.graph.node}
    for node in rest.graph.node:
        assert node.SerializeToString() == originals[node.output[0]].SerializeToString()
    expected = ModelProto()
    expected.CopyFrom(model)
    for one in (expected, rest):
        for field in ("node", "initializer", "output", "value_info"):
            one.graph.ClearField(field)
    assert rest.SerializeToString(deterministic=True) == expected.SerializeToString(
        deterministic=True
    )


def test_nothing_changes_where_all_outputs_are_kept() -> None:
    model = two_heads()
    assert stripped(model, "aux", "main") == model


def test_the_outputs_keep_the_models_order() -> None:
    model = two_heads()
    deep = helper.make_tensor_value_info("deep", TensorProto.FLOAT, ["N", 5, "H", "W"])
    model.graph.output.append(deep)
    assert [value.name for value in stripped(model, "deep", "main").graph.output] == [
        "main",
        "deep",
    ]


def test_a_shared_weight_stays() -> None:
    model = two_heads()
    model.graph.node[3].input[1] = "aux_head"
    del model.graph.initializer[2]
    model.graph.initializer[2].CopyFrom(
        numpy_helper.from_array(np.ones((2, 2, 1, 1), np.float32), "main_head")
    )
    assert "aux_head" in stored(stripped(model, "main"))


@pytest.mark.parametrize(("kept", "count"), [("aux", 1), ("main", 2)])
def test_an_output_that_feeds_another_branch_stays_as_a_value(kept: str, count: int) -> None:
    model = model_of(
        """chain (float[N,3] x) => (float[N,3] aux, float[N,3] main)
        { aux = Relu(x)
          main = Neg(aux) }"""
    )
    rest = stripped(model, kept)
    assert len(rest.graph.node) == count
    assert [value.name for value in rest.graph.output] == [kept]


def test_an_operator_with_two_results_stays_whole() -> None:
    model = model_of(
        """cut (float[N,4] x) => (float[N,2] left, float[N,2] gone)
        { left, right = Split<axis=1, num_outputs=2>(x)
          gone = Neg(right) }"""
    )
    rest = stripped(model, "left")
    assert list(rest.graph.node[0].output) == ["left", "right"]


def test_an_output_that_is_the_input_or_a_weight_needs_no_node() -> None:
    model = model_of("plain (float[2] x) => (float[2] y) { y = Relu(x) }", w=(2,))
    for name in ("x", "w"):
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]))
    of_input, of_weight = stripped(model, "x"), stripped(model, "w")
    assert not of_input.graph.node
    assert not of_weight.graph.node
    assert [value.name for value in of_input.graph.input] == ["x"]
    assert (list(of_weight.graph.input), stored(of_weight)) == ([], {"w"})


def test_inputs_that_only_removed_outputs_need_go() -> None:
    model = model_of(
        """two (float[2] x, float[2] hint) => (float[2] y, float[2] z)
        { y = Relu(x)
          z = Add(x, hint) }"""
    )
    assert [value.name for value in stripped(model, "y").graph.input] == ["x"]
    assert len(stripped(model, "z").graph.input) == 2


def test_weights_listed_as_inputs_stay_with_their_entry() -> None:
    model = two_heads()
    for name, shape in (("stem", [4, 3, 1, 1]), ("aux_head", [2, 4, 1, 1])):
        model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    rest = stripped(model, "main")
    assert [value.name for value in rest.graph.input] == ["images", "stem"]


CAPTURING = """branch (bool flag, float[2] x) => (float[2] y, float[2] z)
{
  seen = Relu(x)
  inner_only = Neg(x)
  unseen = Abs(x)
  z = Sqrt(unseen)
  y = If (flag) <
    then_branch = then_body () => (float[2] t) {
      t = If (flag) <
        then_branch = deep () => (float[2] d) { d = Add(inner_only, weight) },
        else_branch = other () => (float[2] d) { d = Identity(x) }
      >
    },
    else_branch = else_body () => (float[2] e) {
      d = Relu(seen)
      e = Neg(d)
    }
  >
}"""


def test_values_and_weights_that_only_bodies_read_stay() -> None:
    model = model_of(CAPTURING, weight=(2,), other_weight=(2,))
    rest = stripped(model, "y")
    assert names(rest) == ["seen", "inner_only", "y"]
    assert stored(rest) == {"weight"}
    assert names(stripped(model, "z")) == ["unseen", "z"]


def test_the_bodies_of_a_loop_hold_what_they_capture() -> None:
    model = model_of(
        """loop (int64 trips, bool go, float[2] x) => (float[2] y, float[2] z)
        {
          step = Neg(x)
          z = Abs(x)
          y = Loop (trips, go, x) <
            body = one (int64 i, bool c, float[2] carried) => (bool c_out, float[2] next) {
              c_out = Identity(c)
              next = Add(carried, step)
            }
          >
        }"""
    )
    assert names(stripped(model, "y")) == ["step", "y"]


FUNCTIONS = """
calls (float[2] x) => (float[2] y, float[2] z)
{ y = own.outer(x)
  z = own.alone(x) }
<domain: "own", opset_import: ["" : 20, "own" : 1]>
inner (a) => (b) { b = Relu(a) }
<domain: "own", opset_import: ["" : 20, "own" : 1]>
outer (a) => (b) { c = own.inner(a)
                   b = Neg(c) }
<domain: "own", opset_import: ["" : 20, "own" : 1]>
alone (a) => (b) { b = Abs(a) }
"""


def test_functions_stay_where_they_are_called_also_by_other_functions() -> None:
    model = model_of(FUNCTIONS)
    assert [function.name for function in stripped(model, "y").functions] == ["inner", "outer"]
    assert [function.name for function in stripped(model, "z").functions] == ["alone"]


def sparse(name: str) -> onnx.SparseTensorProto:
    return helper.make_sparse_tensor(
        helper.make_tensor(name, TensorProto.FLOAT, [2], [1.5, -2.0]),
        helper.make_tensor("places", TensorProto.INT64, [2], [0, 3]),
        [4],
    )


def test_sparse_weights_stay_where_they_are_needed() -> None:
    model = parser.parse_model(
        HEAD + "s (float[4] x) => (float[4] y, float[4] z) { y = Add(x, a)\nz = Mul(x, b) }"
    )
    model.graph.sparse_initializer.extend([sparse("a"), sparse("b")])
    rest = restricted(model, ancestors(model, ["y"]), ["y"])
    assert [tensor.values.name for tensor in rest.graph.sparse_initializer] == ["a"]
    assert identity_line(model, rest, ["y"], "model.onnx").passed
    assert first_change(model, rest) is None
    rest.graph.sparse_initializer[0].indices.int64_data[1] = 2
    assert identity_line(model, rest, ["y"], "model.onnx").passed is False


def test_annotations_stay_with_their_tensors_and_hold_their_scales() -> None:
    model = model_of(
        "q (float[2] x) => (float[2] y, float[2] z) { y = Relu(x)\nz = Neg(x) }",
        y_scale=(1,),
        z_scale=(1,),
    )
    for name in ("y", "z"):
        annotation = onnx.TensorAnnotation(tensor_name=name)
        annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value=f"{name}_scale")
        model.graph.quantization_annotation.append(annotation)
    rest = stripped(model, "y")
    assert [note.tensor_name for note in rest.graph.quantization_annotation] == ["y"]
    assert stored(rest) == {"y_scale"}


def test_how_to_train_the_model_goes() -> None:
    model = two_heads()
    model.training_info.add().algorithm.name = "sgd"
    part = ancestors(model, ["main"])
    assert not restricted(model, part, ["main"]).training_info


def test_what_no_output_needs_goes_too() -> None:
    model = two_heads()
    model.graph.node.append(helper.make_node("Relu", ["main"], ["unread"]))
    model.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "unused"))
    rest = stripped(model, "main")
    assert "unread" not in names(rest)
    assert "unused" not in stored(rest)


def change_attribute(model: ModelProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("strides", [1, 1]))


def change_weight(model: ModelProto) -> None:
    tensor = model.graph.initializer[0]
    raw = bytearray(tensor.raw_data)
    raw[0] ^= 1
    tensor.raw_data = bytes(raw)


def change_order(model: ModelProto) -> None:
    tensors = list(model.graph.initializer)
    del model.graph.initializer[:]
    model.graph.initializer.extend(reversed(tensors))


def change_opset(model: ModelProto) -> None:
    model.opset_import[0].version = 19


def change_metadata(model: ModelProto) -> None:
    model.metadata_props.add(key="author", value="somebody else")


def change_output(model: ModelProto) -> None:
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "B"


def change_name(model: ModelProto) -> None:
    model.graph.name = "other"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (change_attribute, "node 'features' is not the original's"),
        (change_weight, "initializer 'stem' is not the original's"),
        (change_order, "initializer 'body' is not the original's"),
        (change_opset, "opset_import changed"),
        (change_metadata, "metadata changed"),
        (change_output, "output 'main' is not the original's"),
        (change_name, "graph.name changed"),
    ],
)
def test_a_file_that_is_not_the_originals_part_fails_and_the_change_is_named(
    change: object, words: str
) -> None:
    model = two_heads()
    rest = stripped(model, "main")
    assert callable(change)
    change(rest)
    line = identity_line(model, rest, ["main"], "model.onnx")
    assert line.passed is False
    assert words in line.detail


def test_a_missing_node_is_seen() -> None:
    model = two_heads()
    rest = stripped(model, "main")
    del rest.graph.node[1]
    rest.graph.node[1].input[0] = "features"
    assert identity_line(model, rest, ["main"], "model.onnx").passed is False


def test_what_is_left_of_an_auxiliary_head_is_named() -> None:
    model = two_heads()
    left = ModelProto()
    left.CopyFrom(model)
    del left.graph.output[1]
    line = survivors_line(left, ["main"], Removed.between(model, left))
    assert line.passed is False
    assert "first node 'side' (Relu)" in line.detail
    assert line.figures["first"] == [
        "node 'side' (Relu)",
        "node 'aux' (Conv)",
        "initialiser 'aux_head'",
        "value_info 'side'",
    ]
    assert identity_line(model, left, ["main"], "model.onnx").passed is False


def test_an_output_too_many_is_a_survivor() -> None:
    model = two_heads()
    line = survivors_line(model, ["main"], Removed.between(model, model))
    assert "output 'aux'" in line.figures["first"]


@st.composite
def random_models(draw: st.DrawFn) -> ModelProto:
    """A directed graph without cycles over float[3] values, some of them outputs."""
    values = ["x0", "x1", "w0", "w1", "w2"]
    nodes = []
    for index in range(draw(st.integers(1, 12))):
        name = f"v{index}"
        if draw(st.booleans()):
            operator = draw(st.sampled_from(["Neg", "Abs", "Tanh"]))
            nodes.append(helper.make_node(operator, [draw(st.sampled_from(values))], [name]))
        else:
            operator = draw(st.sampled_from(["Add", "Sub", "Max"]))
            read = [draw(st.sampled_from(values)), draw(st.sampled_from(values))]
            nodes.append(helper.make_node(operator, read, [name]))
        values.append(name)
    made = [node.output[0] for node in nodes]
    outputs = draw(st.lists(st.sampled_from(made), min_size=1, max_size=4, unique=True))
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    weights = [
        numpy_helper.from_array(rng.standard_normal(3).astype(np.float32), f"w{i}")
        for i in range(3)
    ]
    graph = helper.make_graph(
        nodes,
        "random",
        [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, [3]) for i in range(2)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in outputs],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@given(model=random_models(), data=st.data())
@settings(deadline=None, max_examples=60)
def test_any_graph_becomes_what_onnx_itself_extracts_and_computes_the_same(
    model: ModelProto, data: st.DataObject
) -> None:
    outputs = [value.name for value in model.graph.output]
    keep = data.draw(st.lists(st.sampled_from(outputs), min_size=1, unique=True))
    rest = stripped(model, *keep)
    ordered = [name for name in outputs if name in keep]
    extracted = Extractor(model).extract_model([v.name for v in rest.graph.input], ordered)
    assert list(rest.graph.node) == list(extracted.graph.node)
    assert list(rest.graph.initializer) == list(extracted.graph.initializer)
    assert list(rest.graph.output) == list(extracted.graph.output)
    feed = {f"x{i}": np.linspace(-1, 2 + i, 3).astype(np.float32) for i in range(2)}
    needed = {value.name: feed[value.name] for value in rest.graph.input}
    expected = ReferenceEvaluator(model).run(ordered, feed)
    found = ReferenceEvaluator(rest).run(ordered, needed)
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a, b)
