"""Layer by layer, the node where two graphs part is named, and what to keep in float32."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import ModelProto, TensorProto, numpy_helper

from srdeploy.errors import UserError
from srdeploy.export import layer_errors as module
from srdeploy.export.layer_errors import (
    LayerError,
    explain_jump,
    first_jump,
    layer_errors,
    nodes_to_keep,
)
from srdeploy.imaging import Pixels

BODY, HEAD = "network/body/0/Conv", "network/head/Conv"
ROUNDING = 1e-5

Array = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def plain(tiny_file: Path) -> ModelProto:
    return onnx.load(str(tiny_file))


def edited(model: ModelProto, initialiser: str, change: Callable[[Array], Array]) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    tensor = next(t for t in copy.graph.initializer if t.name == initialiser)
    array = np.asarray(change(numpy_helper.to_array(tensor)), np.float32)
    tensor.CopyFrom(numpy_helper.from_array(array, initialiser))
    return copy


def half(values: Array) -> Array:
    changed = values.copy()
    changed[0] *= 0.5
    return changed


def test_equal_graphs_have_no_errors(plain: ModelProto, photos: list[Pixels]) -> None:
    errors = layer_errors(plain, plain, photos[0])
    assert {BODY, HEAD} <= {one.node for one in errors}
    assert [one.error for one in errors] == [0.0] * len(errors)
    assert first_jump(errors, ROUNDING) is None
    assert "both graphs compute the same" in explain_jump(errors, ROUNDING, convertible=True)


@pytest.mark.parametrize(("weight", "node"), [("body.0", BODY), ("head", HEAD)])
def test_the_node_whose_weight_is_broken_is_the_first_named(
    plain: ModelProto, photos: list[Pixels], weight: str, node: str
) -> None:
    broken = edited(plain, f"network.{weight}.weight", half)
    errors = layer_errors(plain, broken, photos[0])
    first = first_jump(errors, ROUNDING)
    assert first is not None
    assert (first.node, first.operator, first.before) == (node, "Conv", 0.0)
    place = [one.node for one in errors].index(node)
    assert all(one.error == 0 for one in errors[:place])
    assert all(one.error for one in errors[place:])
    text = explain_jump(errors, ROUNDING, convertible=True)
    assert f"begins at node '{node}' (Conv): 0.00% before it" in text
    assert text.endswith(f"--keep '{node}'")
    assert "--keep" not in explain_jump(errors, ROUNDING, convertible=False)


def test_an_error_is_the_differences_size_relative_to_the_references(
    plain: ModelProto, photos: list[Pixels]
) -> None:
    doubled = edited(
        edited(plain, "network.head.weight", lambda w: w * 2), "network.head.bias", lambda b: b * 2
    )
    errors = {one.node: one for one in layer_errors(plain, doubled, photos[0])}
    assert errors[HEAD].error == pytest.approx(1.0)
    assert errors[HEAD].reads != ()
    assert errors[errors[HEAD].reads[0]].error == 0.0


def test_the_first_node_that_gives_nan_is_named(plain: ModelProto, photos: list[Pixels]) -> None:
    broken = edited(plain, "network.body.0.bias", lambda bias: bias * np.nan)
    errors = layer_errors(plain, broken, photos[0])
    first = first_jump(errors, ROUNDING)
    assert first is not None
    assert (first.node, first.error) == (BODY, None)
    text = explain_jump(errors, ROUNDING, convertible=True)
    assert f"first NaN or infinity comes from node '{BODY}' (Conv)" in text
    assert text.endswith(f"--keep '{BODY}'")


def test_layers_beyond_fp16s_range_are_kept_together_with_those_that_read_them() -> None:
    def layer(node: str, error: float | None, largest: float, *reads: str) -> LayerError:
        return LayerError(
            node=node, operator="Conv", error=error, before=0.0, largest=largest, reads=reads
        )

    errors = [
        layer("a", 0.0, 10),
        layer("b", None, 1e5, "a"),
        layer("c", None, 50, "b"),
        layer("d", None, 20, "c"),
    ]
    assert nodes_to_keep(errors, 1e-3) == ["b", "c"]
    text = explain_jump(errors, 1e-3, convertible=True)
    assert "reaches 1e+05 (fp16 ends at 65504)" in text
    assert text.endswith("--keep 'b' --keep 'c'")


def test_where_no_layer_stands_out_those_that_add_most_are_named() -> None:
    steps = [0.0005, 0.002, 0.006, 0.007, 0.010]
    errors = [
        LayerError(
            node=f"n{i}", operator="Conv", error=e, before=b, largest=1.0, reads=(f"n{i - 1}",)
        )
        for i, (b, e) in enumerate(zip([0.0, *steps], steps, strict=False))
    ]
    assert first_jump(errors, 1e-2) is None
    assert nodes_to_keep(errors, 1e-2) == ["n1", "n2", "n4"]
    assert "grows step by step to 1.00% at 'n4'" in explain_jump(errors, 1e-2, convertible=True)


def test_nodes_that_only_the_converted_graph_has_are_passed_over(
    plain: ModelProto, photos: list[Pixels]
) -> None:
    """As a conversion leaves them: a pair of casts behind a layer, whose own name stays."""
    converted = ModelProto()
    converted.CopyFrom(plain)
    index, conv = next((i, n) for i, n in enumerate(converted.graph.node) if n.name == BODY)
    reader = converted.graph.node[index + 1]
    casts = [
        onnx.helper.make_node("Cast", [conv.output[0]], ["low"], to=TensorProto.FLOAT16),
        onnx.helper.make_node("Cast", ["low"], ["high"], to=TensorProto.FLOAT),
    ]
    reader.input[0] = "high"
    for position, cast in enumerate(casts):
        converted.graph.node.insert(index + 1 + position, cast)
    errors = {one.node: one for one in layer_errors(plain, converted, photos[0])}
    assert errors[BODY].error == 0.0
    following = next(one for one in errors.values() if BODY in one.reads)
    assert following.error is not None
    assert 1e-5 < following.error < 1e-3


def test_taking_the_tensors_in_many_small_parts_changes_nothing(
    plain: ModelProto, photos: list[Pixels], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = edited(plain, "network.body.0.weight", half)
    whole = layer_errors(plain, broken, photos[0])
    runs = []
    run = module._run

    def counted(model: ModelProto, names: list[str], feed: dict[str, Any], what: str) -> Any:
        runs.append(len(names))
        return run(model, names, feed, what)

    monkeypatch.setattr(module, "_run", counted)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 150_000)
    assert layer_errors(plain, broken, photos[0]) == whole
    assert len(runs) > 4
    assert max(runs) < len(whole)


def test_a_graph_that_can_not_be_run_is_said_in_one_line(
    plain: ModelProto, photos: list[Pixels]
) -> None:
    broken = edited(plain, "network.head.weight", lambda weight: weight[:, :-1])
    with pytest.raises(UserError, match="the converted graph can't be run layer by layer") as told:
        layer_errors(plain, broken, photos[0])
    assert "\n" not in str(told.value)
