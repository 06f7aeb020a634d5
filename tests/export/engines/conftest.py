"""Tiny typed graphs that TensorRT's parser takes, written with onnx alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from srdeploy.spec import Spec

MakeTyped = Callable[..., Path]
FLOATS = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


@pytest.fixture(scope="session")
def rtx() -> Any:
    """TensorRT for RTX, or a skip that says what was not tested."""
    try:
        import tensorrt_rtx
    except ImportError:
        pytest.skip("no tensorrt_rtx here: engines were NOT built (pip install tensorrt-rtx)")
    return tensorrt_rtx


@pytest.fixture
def typed_graph(tmp_path: Path, spec: Spec) -> MakeTyped:
    """Writes a graph of two convolutions, each of its own type, between uint8 photos and
    labels."""

    def make(
        first: str = "fp32",
        second: str = "fp32",
        name: str = "model.onnx",
        *,
        seed: int = 0,
        odd: str | None = None,
        with_spec: bool = True,
        size: tuple[Any, Any, Any] = ("N", "H", "W"),
        channels: int = 8,
    ) -> Path:
        path = tmp_path / name
        model = typed_model(first, second, seed, odd, size, channels)
        if with_spec:
            model.metadata_props.add(key="srdeploy.spec", value=spec.to_json())
        onnx.save(model, str(path))
        return path

    return make


def typed_model(
    first: str,
    second: str,
    seed: int,
    odd: str | None,
    size: tuple[Any, Any, Any],
    channels: int,
) -> onnx.ModelProto:
    """`odd`: an operator that is laid over the logits."""
    rng = np.random.default_rng(seed)
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT, name="cast"),
        helper.make_node("Transpose", ["floats"], ["planes"], perm=[0, 3, 1, 2], name="planes"),
    ]
    stored: list[TensorProto] = []
    kernels = {
        "stem/Conv": rng.standard_normal((channels, 3, 3, 3)),
        "head/Conv": rng.standard_normal((3, channels, 1, 1)),
    }
    tensor = "planes"
    for (layer, kernel), kind in zip(kernels.items(), (first, second), strict=True):
        tensor = _convolution(layer, tensor, kernel.astype(np.float32), kind, nodes, stored)
    if odd is not None:
        nodes.append(helper.make_node(odd, [tensor], ["odd"], name="head/Odd"))
        tensor = "odd"
    nodes += [
        helper.make_node("ArgMax", [tensor], ["best"], axis=1, keepdims=0, name="best"),
        helper.make_node("Cast", ["best"], ["labels"], to=TensorProto.UINT8, name="labels"),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, [*size, 3])
    labels = helper.make_tensor_value_info("labels", TensorProto.UINT8, list(size))
    graph = helper.make_graph(nodes, "tiny", [images], [labels], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def _convolution(
    name: str,
    tensor: str,
    kernel: np.ndarray,
    kind: str,
    nodes: list[NodeProto],
    stored: list[TensorProto],
) -> str:
    """Appends a convolution of a type, float32 around it; returns its output's name."""
    pads = [kernel.shape[2] // 2] * 4
    if kind == "int8":
        quantised = np.clip(np.round(kernel / 0.03), -127, 127).astype(np.int8)
        stored += [
            numpy_helper.from_array(quantised, f"{name}.weight"),
            numpy_helper.from_array(np.array(0.03, np.float32), f"{name}.scale"),
            numpy_helper.from_array(np.array(2, np.float32), f"{name}.input_scale"),
            numpy_helper.from_array(np.array(0, np.int8), f"{name}.zero"),
        ]
        ends = [f"{name}.input_scale", f"{name}.zero"]
        nodes += [
            helper.make_node("QuantizeLinear", [tensor, *ends], [f"{name}.q"], name=f"{name}/Q"),
            helper.make_node(
                "DequantizeLinear", [f"{name}.q", *ends], [f"{name}.in"], name=f"{name}/DQ"
            ),
            helper.make_node(
                "DequantizeLinear",
                [f"{name}.weight", f"{name}.scale", f"{name}.zero"],
                [f"{name}.w"],
                name=f"{name}/WeightDQ",
            ),
            helper.make_node("Conv", [f"{name}.in", f"{name}.w"], [name], pads=pads, name=name),
        ]
        return name
    type_ = FLOATS[kind]
    weight = helper.make_tensor(f"{name}.weight", type_, kernel.shape, kernel.flatten().tolist())
    stored.append(weight)
    cast, back = f"{name}/Cast", f"{name}/Back"
    nodes += [
        helper.make_node("Cast", [tensor], [cast], to=type_, name=cast),
        helper.make_node("Conv", [cast, f"{name}.weight"], [name], pads=pads, name=name),
        helper.make_node("Cast", [name], [back], to=TensorProto.FLOAT, name=back),
    ]
    return back
