"""int8 as explicit QuantizeLinear and DequantizeLinear pairs, calibrated on pictures.

Two forms: `tensorrt` is symmetric and leaves biases in float32, which TensorRT wants; `cpu` has
uint8 activations, int8 kernels and int32 biases, which onnxruntime and OpenVINO compute fastest. On
x86 processors without VNNI instructions (before 2019 or so), sums of two uint8 x int8 products may
saturate in the cpu form: look at the verification there.
"""

from collections.abc import Collection, Sequence

import numpy as np
import onnx
from onnx import ModelProto, TensorProto

from srdeploy.errors import UserError
from srdeploy.export.certificate import opset_of
from srdeploy.export.precision.placement import WEIGHTED, Placement, is_weighted, place
from srdeploy.export.precision.qdq import write_rounding
from srdeploy.export.precision.ranges import measure_ranges
from srdeploy.export.precision.zones import kept_nodes
from srdeploy.imaging import Pixels
from srdeploy.precision import PRECISION_KEY, TARGET_KEY, Target

LEAST_OPSET = 13
"""The first operator set in which DequantizeLinear takes a scale per channel."""


def to_int8(
    model: ModelProto,
    pictures: Sequence[Pixels],
    target: Target,
    keep: Collection[str] = (),
    ends: bool = False,
) -> ModelProto:
    """A copy of `model` that is rounded to int8 where it pays; inputs and outputs keep their types.

    model: float32, with its tensors loaded. pictures: uint8 [H, W, 3], as the network will see
    them. keep: names of nodes, or shell patterns of names, that stay float32. ends: whether the
    first and the last weighted operators become int8 too. Nodes and values keep their names. The
    same pictures give the same bytes. Raises UserError where nothing is there to be quantised, for
    a graph that is not float32, a pattern that matches nothing, and pictures that can't be used.
    """
    _check_pictures(pictures)
    _check_graph(model)
    kept = kept_nodes(model.graph, keep)
    placement = place(model, target, kept, ends)
    if not placement.weighted:
        raise UserError(
            "int8 would quantise nothing: the graph's weighted operators are all among the first "
            "and last ones, kept in float32, or of kinds that have no int8 form; quantise the "
            "first and last too (--quantise-ends), keep fewer, or deploy it in fp16"
        )
    ranges = measure_ranges(model, _measured(placement), pictures)
    typed = ModelProto()
    typed.CopyFrom(model)
    write_rounding(typed, placement, ranges, target)
    metadata = {entry.key: entry.value for entry in typed.metadata_props}
    metadata |= {PRECISION_KEY: "int8", TARGET_KEY: target}
    onnx.helper.set_model_props(typed, dict(sorted(metadata.items())))
    onnx.checker.check_model(typed, full_check=True)
    return typed


def _measured(placement: Placement) -> list[str]:
    """The values whose ranges decide, in a fixed order."""
    return sorted({placement.scale_of(name) for name in placement.reads})


def _check_pictures(pictures: Sequence[Pixels]) -> None:
    if not pictures:
        raise UserError("int8 needs pictures to measure ranges on, and none were given")
    for index, picture in enumerate(pictures):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise UserError(
                f"calibration picture {index} is {picture.dtype} {list(picture.shape)}: "
                "uint8 [H, W, 3] is needed"
            )


def _check_graph(model: ModelProto) -> None:
    graph = model.graph
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "QLinearConv", "ConvInteger"):
            raise UserError(
                f"the graph is quantised already (node '{node.name}', {node.op_type}): "
                "give the fp32 export"
            )
    stored = {tensor.name: tensor for tensor in graph.initializer}
    weighted = [node for node in graph.node if is_weighted(node, stored)]
    if not weighted:
        raise UserError(
            f"the graph has no {', '.join(WEIGHTED[:-1])} or {WEIGHTED[-1]} with stored weights: "
            "there is nothing to quantise"
        )
    for node in weighted:
        kind = stored[node.input[1]].data_type
        if kind != TensorProto.FLOAT:
            name = TensorProto.DataType.Name(kind).lower()
            raise UserError(
                f"the weights of node '{node.name}' are {name}: int8 starts from the fp32 export"
            )
    if opset_of(model) < LEAST_OPSET:
        raise UserError(
            f"the graph is of operator set {opset_of(model)}, and int8 needs {LEAST_OPSET} or "
            "newer: export it again with a newer one"
        )
