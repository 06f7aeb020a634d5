"""Precision read from a built engine's layers, as TensorRT's inspector describes them, and from
networks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from srdeploy.errors import UserError
from srdeploy.export.engines.build import parse_onnx
from srdeploy.export.engines.read_back import (
    count_types,
    engine_types,
    network_types,
    require_agreement,
)

MakeTyped = Callable[..., Path]
WEIGHTED = {"stem/Conv": "float16", "head/Conv": "float16"}


def layer(name: str, reads: str, tactic: str = "", origins: tuple[str, ...] = ()) -> dict[str, Any]:
    """One layer as the inspector gives it; the origins are joined with a unit separator."""
    return {
        "Name": name,
        "LayerType": "CaskConvolution",
        "Inputs": [{"Name": "x", "Dimensions": [1, 8, 48, 64], "Format/Datatype": reads}],
        "Outputs": [{"Name": "y", "Dimensions": [1, 8, 48, 64], "Format/Datatype": reads}],
        "TacticName": tactic,
        "Metadata": "\x1f".join(f"[ONNX Layer: {origin}]" for origin in origins),
    }


class FakeTrt:
    """The one name that reading needs."""

    class LayerInformationFormat:
        JSON = "json"


class FakeEngine:
    """An engine that its inspector describes with given layers."""

    def __init__(self, *layers: Any) -> None:
        self.told = json.dumps({"Layers": layers, "Bindings": ["images", "labels"]})

    def create_engine_inspector(self) -> "FakeEngine":
        return self

    def get_engine_information(self, format: str) -> str:
        assert format == "json"
        return self.told


def read(*layers: Any) -> dict[str, str]:
    return engine_types(FakeTrt, FakeEngine(*layers), WEIGHTED)


@pytest.mark.parametrize(
    ("described", "type_"),
    [
        ("Half", "float16"),
        ("Row major linear FP16 format", "float16"),
        ("Channel major FP16 format where channel % 8 == 0", "float16"),
        ("Float", "float32"),
        ("Row major linear FP32", "float32"),
        ("BFloat16", "bfloat16"),
        ("Row major linear BF16", "bfloat16"),
        ("Int8", "int8"),
        ("Thirty-two wide channel vectorized row major Int8 format", "int8"),
    ],
)
def test_a_layer_has_the_type_that_it_reads(described: str, type_: str) -> None:
    assert read(layer("stem", described, origins=("stem/Conv",))) == {"stem/Conv": type_}


def test_layers_without_weights_do_not_count() -> None:
    found = read(
        layer("Reformatting CopyNode", "Row major linear FP32"),
        layer("stem/Conv + relu", "Half", origins=("stem/Conv", "relu")),
        layer("myl0_3", "Float", origins=("resize",)),
        layer("head/Conv", "Half", origins=("head/Conv",)),
    )
    assert found == WEIGHTED
    assert count_types(found) == {"float16": 2}


def test_without_origins_every_layer_that_reads_floats_counts() -> None:
    found = read(layer("a", "Half"), layer("b", "Float"), layer("c", "UInt8"), layer("d", "Int64"))
    assert found == {"a": "float16", "b": "float32"}


def test_kernels_in_tf32_are_found_by_their_name() -> None:
    kernel = "sm80_xmma_fprop_implicit_gemm_indexed_tf32f32_tf32f32_f32_nhwckrsc_nhwc"
    found = read(layer("stem", "Float", kernel, ("stem/Conv",)))
    assert found == {"stem/Conv": "tf32"}
    require_agreement("tf32", found, Path("model.onnx"))
    with pytest.raises(UserError, match="fp32 was asked for, but 1 layers .* multiply in tf32"):
        require_agreement("fp32", found, Path("model.onnx"))


@pytest.mark.parametrize("layers", [[], ["stem/Conv + relu", "head/Conv"]])
def test_an_engine_that_tells_names_alone_is_no_proof(layers: list[str]) -> None:
    with pytest.raises(UserError, match="tells no types of its layers"):
        read(*layers)


def test_a_graph_without_weights_has_no_precision_but_float32() -> None:
    require_agreement("fp32", {}, Path("model.onnx"))
    with pytest.raises(UserError, match=r"compute otherwise \(there are none\)"):
        require_agreement("fp16", {}, Path("model.onnx"))


def test_a_network_is_parsed_as_strongly_typed(rtx: Any, typed_graph: MakeTyped) -> None:
    parsed = parse_onnx(typed_graph("fp16", "int8"), "rtx")
    assert parsed.network.get_flag(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert network_types(rtx, parsed.network) == {"stem/Conv": "float16", "head/Conv": "int8"}


def test_products_with_stored_factors_count_and_others_do_not(rtx: Any, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16, name="cast"),
        helper.make_node("Transpose", ["w"], ["turned"], perm=[1, 0], name="turn"),
        helper.make_node("MatMul", ["half", "turned"], ["a"], name="projection"),
        helper.make_node("Transpose", ["a"], ["b"], perm=[1, 0], name="flip"),
        helper.make_node("MatMul", ["a", "b"], ["y"], name="attention"),
    ]
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, [4, 4])],
        [helper.make_tensor("w", TensorProto.FLOAT16, [6, 8], [0.5] * 48)],
    )
    path = tmp_path / "products.onnx"
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), str(path))
    found = network_types(rtx, parse_onnx(path, "rtx").network)
    assert found == {"projection": "float16"}
