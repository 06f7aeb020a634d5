"""What an ONNX segmentation graph takes and gives, read from the file without running it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from srdeploy.errors import UserError
from srdeploy.files import explain_os_error
from srdeploy.graph.operators import QUANTISING
from srdeploy.spec import ONNX_KEY, InputPolicy, Spec
from srdeploy.validation import validated

if TYPE_CHECKING:
    import onnx

INPUT_KEY = "srdeploy.input"
OUTPUT_KEY = "srdeploy.output"
VERSION_KEY = "srdeploy.version"
"""Keys of the metadata beside the spec: what the graph takes and gives, and which srdeploy wrote
it."""

Shape = tuple[int | None, int | None, int | None, int]
"""(N, H, W, 3) of the images a runtime accepts; None: any."""


@dataclass(frozen=True)
class Signature:
    """Input, outputs and metadata of an ONNX segmentation graph."""

    input_name: str
    input: Literal["uint8", "float32"]
    """uint8: photos [N, H, W, 3]; float32: normalised by the client, [N, 3, H, W]."""
    shape: Shape
    """Images as the runtime takes them, whatever the graph's own layout."""
    labels: str | None
    """Name of the output with a class id per pixel, integer [N, H, W]."""
    logits: str | None
    """Name of the output with class scores, float [N, K, h, w]."""
    classes: int | None
    """K of the logits where the graph fixes it."""
    precision: str
    """Type of the stored kernels: float32, float16, bfloat16, int8; joined with + where mixed."""
    weights: int
    """Values stored as initialisers, shape constants left out; batch norms may be folded away."""
    spec: Spec | None
    """The spec from the metadata; None in files that other tools wrote."""


def read_signature(path: Path) -> Signature:
    """Parses `path`. Raises UserError where it is no ONNX file, or no graph that we can feed."""
    return signature_of(_parse(path), path)


def signature_of(model: "onnx.ModelProto", path: Path) -> Signature:
    """What `model` takes and gives; errors name `path`. Raises UserError as read_signature."""
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in stored]
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs) or "none"
        raise UserError(f"{path}: one input (the images) is expected, this graph has {names}")
    kind, shape = _read_input(inputs[0], path)
    labels, logits, classes = _read_outputs(model.graph.output, path)
    spec = _read_spec(model, path)
    if spec is not None:
        check_class_count(classes, spec, path)
    return Signature(
        input_name=inputs[0].name,
        input=kind,
        shape=shape,
        labels=labels,
        logits=logits,
        classes=classes,
        precision=_precision(model),
        weights=_count_weights(model),
        spec=spec,
    )


def spec_for_graph(spec: Spec, signature: Signature) -> Spec:
    """`spec` for a graph that it was not made with: a graph of one size fixes the policy."""
    _, height, width, _ = signature.shape
    if height is None or width is None:
        return spec
    size = (height, width)
    policy = InputPolicy(smallest=size, usual=size, largest=size)
    return spec.model_copy(update={"input": policy})


def check_class_count(classes: int | None, spec: Spec, path: Path) -> None:
    """Raises UserError where the graph's K is fixed and differs from the spec's."""
    if classes is not None and classes != spec.class_count:
        raise UserError(
            f"{path}: its logits have {classes} classes, but the class list has {spec.class_count}"
        )


def _parse(path: Path) -> "onnx.ModelProto":
    import onnx
    from google.protobuf.message import DecodeError

    try:
        # Weights in side files are the runtime's business: only the graph is read here.
        model = onnx.load(str(path), load_external_data=False)
    except DecodeError as error:
        raise UserError(
            f"{path}: not an ONNX file, or a truncated one (it does not parse): export it again"
        ) from error
    except OSError as error:
        raise explain_os_error(error, path) from error
    if not model.graph.node or not model.graph.output:
        raise UserError(f"{path}: not an ONNX file (it holds no graph): export it again")
    return model


def _read_input(
    value: "onnx.ValueInfoProto", path: Path
) -> tuple[Literal["uint8", "float32"], Shape]:
    import onnx

    dtype, dims = _dtype_and_dims(value)
    if dims is not None and len(dims) == 4:
        if dtype == onnx.TensorProto.UINT8 and dims[3] in (3, None):
            return "uint8", (dims[0], dims[1], dims[2], 3)
        if dtype == onnx.TensorProto.FLOAT and dims[1] in (3, None) and dims[3] != 3:
            return "float32", (dims[0], dims[2], dims[3], 3)
    raise UserError(
        f"{path}: the input '{value.name}' is {_describe(value)}; "
        "uint8 [N, H, W, 3] or float32 [N, 3, H, W] is needed"
    )


def _read_outputs(
    values: Sequence["onnx.ValueInfoProto"], path: Path
) -> tuple[str | None, str | None, int | None]:
    """Our own names first; else a lone output is told by its type: integers are labels."""
    by_name = {value.name: value for value in values}
    labels, logits = by_name.get("labels"), by_name.get("logits")
    if labels is None and logits is None:
        if len(values) != 1:
            raise UserError(
                f"{path}: several outputs ({', '.join(by_name)}), none of them named 'labels' "
                "or 'logits'"
            )
        if is_labels(values[0]):
            labels = values[0]
        else:
            logits = values[0]
    if labels is not None and not is_labels(labels):
        raise UserError(
            f"{path}: the output '{labels.name}' is {_describe(labels)}; "
            "integer [N, H, W] is needed"
        )
    classes = None
    if logits is not None:
        if not is_logits(logits):
            raise UserError(
                f"{path}: the output '{logits.name}' is {_describe(logits)}; "
                "labels, integer [N, H, W], or logits, float [N, K, H, W], are needed"
            )
        _, dims = _dtype_and_dims(logits)
        classes = dims[1] if dims is not None else None
    return (
        labels.name if labels is not None else None,
        logits.name if logits is not None else None,
        classes,
    )


def _read_spec(model: "onnx.ModelProto", path: Path) -> Spec | None:
    text = next((p.value for p in model.metadata_props if p.key == ONNX_KEY), None)
    if text is None:
        return None
    where = f"{path}, metadata '{ONNX_KEY}'"
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error.msg}): export the file again") from error
    if not isinstance(values, dict):
        raise UserError(f"{where}: not a JSON object: export the file again")
    return validated(Spec, values, where)


def _dtype_and_dims(value: "onnx.ValueInfoProto") -> tuple[int, list[int | None] | None]:
    """Element type, and dimensions with None for dynamic ones; None where the rank is unknown."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return tensor.elem_type, None
    dims = [dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim]
    return tensor.elem_type, [None if dim is not None and dim < 1 else dim for dim in dims]


def is_labels(value: "onnx.ValueInfoProto") -> bool:
    """Whether its type is that of a class id per pixel, integer [N, H, W]."""
    import onnx

    dtype, dims = _dtype_and_dims(value)
    kinds = onnx.TensorProto
    integers = (kinds.UINT8, kinds.INT8, kinds.UINT16, kinds.INT16, kinds.INT32, kinds.INT64)
    return dtype in integers and (dims is None or len(dims) == 3)


def is_logits(value: "onnx.ValueInfoProto") -> bool:
    """Whether its type is that of class scores, float [N, K, h, w]."""
    import onnx

    dtype, dims = _dtype_and_dims(value)
    return dtype in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16) and (
        dims is None or len(dims) == 4
    )


def opset_of(model: "onnx.ModelProto") -> int:
    """Version of ONNX's own operators that the model is written in; 0 where it names none."""
    return max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)


def _describe(value: "onnx.ValueInfoProto") -> str:
    import onnx

    dtype, dims = _dtype_and_dims(value)
    name = onnx.TensorProto.DataType.Name(dtype).lower()
    shape = (
        "of unknown rank" if dims is None else "[" + ", ".join(str(d or "?") for d in dims) + "]"
    )
    return f"{name} {shape}"


_PRECISIONS = {
    "FLOAT": "float32",
    "FLOAT16": "float16",
    "BFLOAT16": "bfloat16",
    "DOUBLE": "float64",
} | {
    "INT8": "int8",
    "UINT8": "int8",
}


def is_weight(tensor: "onnx.TensorProto") -> bool:
    """Whether it holds weights, whole or quantised, rather than shapes, axes or indices."""
    import onnx

    return onnx.TensorProto.DataType.Name(tensor.data_type) in _PRECISIONS


def _count_weights(model: "onnx.ModelProto") -> int:
    """Quantised or whole, a weight counts once: scales and zero points are none, and a bias stored
    in integers is one."""
    names = set()
    steps = set()
    for node in model.graph.node:
        if node.op_type in QUANTISING:
            steps.update(node.input[1:])
            if node.op_type == "DequantizeLinear":
                names.add(node.input[0])
    return sum(
        prod(tensor.dims)
        for tensor in model.graph.initializer
        if tensor.name in names or (is_weight(tensor) and tensor.name not in steps)
    )


def _precision(model: "onnx.ModelProto") -> str:
    """Type of the matrices and kernels; vectors (biases, scales) do not decide."""
    import onnx

    kinds = {
        _PRECISIONS[onnx.TensorProto.DataType.Name(tensor.data_type)]
        for tensor in model.graph.initializer
        if is_weight(tensor) and len(tensor.dims) >= 2
    }
    return "+".join(sorted(kinds)) or "float32"
