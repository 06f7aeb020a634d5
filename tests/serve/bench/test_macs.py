"""Counting a graph's multiply-accumulates, against torch's counter and against hand counts."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from srdeploy.artifacts.artifact import EngineSidecar, Profile, open_artifact, write_sidecar
from srdeploy.deployable import Deployable
from srdeploy.export.precision.half import to_half
from srdeploy.export.precision.int8 import to_int8
from srdeploy.export.to_onnx import export_onnx
from srdeploy.files import sha256_of
from srdeploy.graph.signature import Signature
from srdeploy.precision import Target
from srdeploy.runs import load_network, open_run
from srdeploy.serve.bench.macs import artifact_macs, graph_macs

MakeGraph = Callable[..., Path]
SIZE = (40, 48)


def macs(path: Path, batch: int = 1, size: tuple[int, int] = SIZE) -> int | None:
    return artifact_macs(open_artifact(path), batch, size)


@pytest.fixture(scope="module")
def export(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's export, photos in and labels out."""
    run = open_run(run_folder)
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    export_onnx(Deployable(load_network(run), run.spec), run.spec, path)
    return path


@pytest.mark.parametrize(("batch", "size"), [(1, (40, 48)), (2, (33, 61)), (5, (40, 48))])
def test_an_export_counts_as_torch_counts_its_run(
    run_folder: Path, export: Path, batch: int, size: tuple[int, int]
) -> None:
    counted = macs(export, batch, size)
    assert counted is not None
    assert counted == macs(run_folder, batch, size)


def test_they_grow_with_batch_and_size(export: Path) -> None:
    one = macs(export, 1, (32, 32))
    assert one is not None
    assert macs(export, 3, (32, 32)) == 3 * one
    assert macs(export, 1, (64, 32)) == 2 * one


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_int8_counts_as_float32(export: Path, tmp_path: Path, target: Target) -> None:
    model = onnx.load(str(export))
    photo = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    onnx.save(to_int8(model, [photo], target), str(tmp_path / "int8.onnx"))
    assert macs(tmp_path / "int8.onnx") == macs(export)


def test_fp16_counts_as_float32_and_bf16_is_not_known(export: Path, tmp_path: Path) -> None:
    model = onnx.load(str(export))
    onnx.save(to_half(model, "fp16"), str(tmp_path / "fp16.onnx"))
    onnx.save(to_half(model, "bf16"), str(tmp_path / "bf16.onnx"))
    assert macs(tmp_path / "fp16.onnx") == macs(export)
    assert macs(tmp_path / "bf16.onnx") is None


def test_an_engine_counts_as_the_graph_that_stands_beside_it(export: Path, tmp_path: Path) -> None:
    graph = tmp_path / "model.onnx"
    graph.write_bytes(export.read_bytes())
    signature = open_artifact(graph).signature
    assert signature is not None
    assert signature.spec is not None
    engine = tmp_path / "model.sm89.engine"
    engine.write_bytes(b"plan")
    write_sidecar(
        engine,
        EngineSidecar(
            builder="tensorrt",
            builder_version="11.4.0",
            compute_capabilities=("8.9",),
            gpu=None,
            cuda_driver=None,
            precision="fp32",
            layer_types={"float32": 23},
            read_from="network",
            profiles=(Profile(smallest=(1, 32, 32), usual=(1, 40, 48), largest=(4, 64, 64)),),
            engine_sha256=sha256_of(engine),
            engine_bytes=4,
            onnx=graph.name,
            onnx_sha256=sha256_of(graph),
            command="srdeploy export runs/night --trt",
            spec=signature.spec,
            signature=signature,
        ),
    )
    assert macs(engine) == macs(graph)
    graph.write_bytes(graph.read_bytes() + b"\0")
    assert macs(engine) is None
    graph.unlink()
    assert macs(engine) is None


def test_what_onnxruntime_can_not_run_here_is_not_known(
    make_graph: MakeGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = make_graph(size=(1, 64, 32))
    assert macs(fixed, 1, (64, 32)) == 64 * 32 * 9
    assert macs(fixed, 1, (32, 32)) is None
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert macs(fixed, 1, (64, 32)) is None


def quantisation(name: str) -> list[onnx.TensorProto]:
    """Scale and zero point `name`_s and `name`_z."""
    return [
        numpy_helper.from_array(np.array(0.5, np.float32), f"{name}_s"),
        numpy_helper.from_array(np.array(0, np.uint8), f"{name}_z"),
    ]


LAYERS: dict[str, tuple[list[NodeProto], Sequence[int], int]] = {
    "grouped, strided": (
        [helper.make_node("Conv", ["planes", "w"], ["y"], group=3, strides=[2, 2])],
        (6, 1, 3, 3),
        2 * 6 * 3 * 5 * 9,
    ),
    "transposed": (
        [helper.make_node("ConvTranspose", ["planes", "w"], ["y"], strides=[2, 2])],
        (3, 5, 2, 2),
        2 * 3 * 8 * 12 * 5 * 4,
    ),
    "product": ([helper.make_node("MatMul", ["planes", "w"], ["y"])], (12, 7), 2 * 3 * 8 * 12 * 7),
    "gemm": (
        [
            helper.make_node("Flatten", ["planes"], ["flat"]),
            helper.make_node("Gemm", ["flat", "w"], ["y"], transB=1),
        ],
        (4, 3 * 8 * 12),
        2 * 4 * 3 * 8 * 12,
    ),
    "integer convolution": (
        [
            helper.make_node("QuantizeLinear", ["planes", "x_s", "x_z"], ["q"]),
            helper.make_node("QuantizeLinear", ["w", "w_s", "w_z"], ["k"]),
            helper.make_node("ConvInteger", ["q", "k", "x_z", "w_z"], ["y"]),
        ],
        (5, 3, 3, 3),
        2 * 5 * 6 * 10 * 27,
    ),
    "quantised convolution": (
        [
            helper.make_node("QuantizeLinear", ["planes", "x_s", "x_z"], ["q"]),
            helper.make_node("QuantizeLinear", ["w", "w_s", "w_z"], ["k"]),
            helper.make_node(
                "QLinearConv",
                ["q", "x_s", "x_z", "k", "w_s", "w_z", "x_s", "x_z"],
                ["y"],
            ),
        ],
        (5, 3, 3, 3),
        2 * 5 * 6 * 10 * 27,
    ),
    "integer product": (
        [
            helper.make_node("QuantizeLinear", ["planes", "x_s", "x_z"], ["q"]),
            helper.make_node("QuantizeLinear", ["w", "w_s", "w_z"], ["k"]),
            helper.make_node("MatMulInteger", ["q", "k"], ["y"]),
        ],
        (12, 7),
        2 * 3 * 8 * 12 * 7,
    ),
    "quantised product": (
        [
            helper.make_node("QuantizeLinear", ["planes", "x_s", "x_z"], ["q"]),
            helper.make_node("QuantizeLinear", ["w", "w_s", "w_z"], ["k"]),
            helper.make_node(
                "QLinearMatMul",
                ["q", "x_s", "x_z", "k", "w_s", "w_z", "x_s", "x_z"],
                ["y"],
            ),
        ],
        (12, 7),
        2 * 3 * 8 * 12 * 7,
    ),
}


def count_layer(
    folder: Path, nodes: list[NodeProto], weight: Sequence[int], batch: int = 2
) -> int | None:
    """Of a graph of planes [batch, 3, 8, 12] and a weight of that shape."""
    made = {name for node in nodes for name in node.input} & {"x_s", "w_s"}
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("planes", TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [onnx.ValueInfoProto(name="y")],
        [
            numpy_helper.from_array(np.ones(weight, np.float32), "w"),
            *(one for name in made for one in quantisation(name[0])),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    model = onnx.shape_inference.infer_shapes(model)
    file = folder / "layer.onnx"
    onnx.save(model, str(file))
    signature = Signature(
        input_name="planes",
        input="float32",
        shape=(None, None, None, 3),
        labels=None,
        logits="y",
        classes=None,
        precision="float32",
        weights=0,
        spec=None,
    )
    return graph_macs(file, signature, batch, (8, 12))


@pytest.mark.parametrize("kind", LAYERS)
def test_each_kind_of_layer_is_counted(tmp_path: Path, kind: str) -> None:
    nodes, weight, expected = LAYERS[kind]
    assert count_layer(tmp_path, nodes, weight) == expected


def test_a_product_of_constants_does_not_grow_with_the_batch(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["w", "w"], ["square"]),
        helper.make_node("MatMul", ["planes", "square"], ["y"]),
    ]
    for batch in (1, 2, 3, 8):
        expected = 12**3 + batch * 3 * 8 * 12 * 12
        assert count_layer(tmp_path, nodes, (12, 12), batch) == expected


def test_a_layer_that_is_not_understood_leaves_the_count_unknown(tmp_path: Path) -> None:
    product = helper.make_node("Einsum", ["planes", "w"], ["y"], equation="nchw,wk->nchk")
    assert count_layer(tmp_path, [product], (12, 7)) is None
