"""Which types an engine's weighted layers compute in, and whether that is what was asked for."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from srdeploy.errors import UserError
from srdeploy.precision import Precision

TYPES: dict[Precision, str] = {
    "fp32": "float32",
    "tf32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "int8": "int8",
}
"""Of the tensors that weighted layers read. tf32 is a way of multiplying float32."""
TF32 = "tf32"
"""The type of a layer whose kernel multiplies float32 in tf32."""

_NARROW = ("int8", "bfloat16", "float16", "float32")
"""As the inspector's formats are told apart: narrowest first."""
_SPELLINGS = {
    "int8": ("int8",),
    "bfloat16": ("bf16", "bfloat16"),
    "float16": ("fp16", "half"),
    "float32": ("fp32", "float"),
}
_ONNX_NAME = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


def network_types(trt: Any, network: Any) -> dict[str, str]:
    """Name -> type of every layer with weights in a strongly typed network.

    Such a network's types bind the builder. A layer between dequantised operands computes in their
    quantised type. A product of two activations has no weights and is left out.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    makers = {
        layer.get_output(index).name: layer
        for layer in layers
        for index in range(layer.num_outputs)
    }
    found = {}
    for layer in layers:
        if layer.type in (trt.LayerType.CONVOLUTION, trt.LayerType.DECONVOLUTION):
            data = layer.get_input(0)
        elif layer.type == trt.LayerType.MATRIX_MULTIPLY:
            operands = [layer.get_input(0), layer.get_input(1)]
            computed = [one for one in operands if not _is_stored(trt, one, makers)]
            if len(computed) != 1:
                continue
            data = computed[0]
        else:
            continue
        found[layer.name] = _type_of(trt, data, makers)
    return found


def engine_types(trt: Any, engine: Any, weighted: Mapping[str, str]) -> dict[str, str]:
    """Layer -> type in a built engine, from its inspector; needs detailed verbosity when building.

    The layers are those of `weighted` (names in the network) that the engine names as the origin
    of one of its own; where it names none of them, all its layers that read floats or int8.
    Raises UserError where the engine holds no details.
    """
    inspector = engine.create_engine_inspector()
    told = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    layers = told.get("Layers", [])
    if not layers or not all(isinstance(layer, dict) for layer in layers):
        raise UserError("the engine tells no types of its layers, so its precision is not known")
    everything: dict[str, str] = {}
    origins: dict[str, set[str]] = {}
    for layer in layers:
        type_ = _inspected_type(layer)
        if type_ is None:
            continue
        everything[str(layer.get("Name"))] = type_
        for name in _ONNX_NAME.findall(str(layer.get("Metadata", ""))):
            if name in weighted:
                origins.setdefault(name, set()).add(type_)
    narrow = (TF32, *_NARROW)
    named = {name: min(types, key=narrow.index) for name, types in origins.items()}
    return named or everything


def count_types(types: Mapping[str, str]) -> dict[str, int]:
    """Type -> number of layers, by name."""
    return dict(sorted(Counter(types.values()).items()))


def require_agreement(precision: Precision, types: Mapping[str, str], onnx: Path) -> None:
    """Raises UserError where the layers' types are not those of `precision`.

    float32 and tf32: all of them. Others: at least one has the type, and the rest are float32,
    which is how layers are kept.
    """
    wanted = TYPES[precision]
    allowed = {wanted, "float32", *((TF32,) if precision == "tf32" else ())}
    if precision != "tf32" and any(type_ == TF32 for type_ in types.values()):
        raise UserError(
            f"{onnx}: {precision} was asked for, but {count_types(types)[TF32]} layers of the "
            "engine multiply in tf32"
        )
    strangers = [name for name, type_ in types.items() if type_ not in allowed]
    if not strangers and (wanted == "float32" or wanted in types.values()):
        return
    counted = ", ".join(f"{count} in {type_}" for type_, count in count_types(types).items())
    first = strangers[0] if strangers else next(iter(types), None)
    named = "" if first is None else f", the first {first}"
    raise UserError(
        f"{onnx}: {precision} was asked for, but its weighted layers compute otherwise "
        f"({counted or 'there are none'}{named}): types are the graph's, so give the graph of "
        f"srdeploy export RUN --precision {precision}"
        + (" --set target=tensorrt" if precision == "int8" else "")
    )


def _type_of(trt: Any, tensor: Any, makers: Mapping[str, Any]) -> str:
    maker = makers.get(tensor.name)
    while maker is not None and maker.type == trt.LayerType.SHUFFLE:
        maker = makers.get(maker.get_input(0).name)
    if maker is not None and maker.type == trt.LayerType.DEQUANTIZE:
        tensor = maker.get_input(0)
    return _name(trt, tensor.dtype)


def _name(trt: Any, type_: Any) -> str:
    names = {
        trt.DataType.FLOAT: "float32",
        trt.DataType.HALF: "float16",
        trt.DataType.BF16: "bfloat16",
        trt.DataType.INT8: "int8",
    }
    return names.get(type_, str(type_))


def _is_stored(trt: Any, tensor: Any, makers: Mapping[str, Any]) -> bool:
    """Whether a tensor comes from a constant, on the way quantised, cast or given another shape."""
    passing = (
        trt.LayerType.CAST,
        trt.LayerType.DEQUANTIZE,
        trt.LayerType.IDENTITY,
        trt.LayerType.QUANTIZE,
        trt.LayerType.SHUFFLE,
        trt.LayerType.SQUEEZE,
        trt.LayerType.UNSQUEEZE,
    )
    maker = makers.get(tensor.name)
    while maker is not None and maker.type in passing:
        maker = makers.get(maker.get_input(0).name)
    return maker is not None and maker.type == trt.LayerType.CONSTANT


def _inspected_type(layer: Mapping[str, Any]) -> str | None:
    """The narrowest type among what an engine's layer reads, from descriptions such as
    "Channel major FP16 format where channel % 8 == 0" or "Half"."""
    formats = [str(one.get("Format/Datatype", "")).lower() for one in layer.get("Inputs", ())]
    found = {type_ for text in formats if (type_ := _described(text)) is not None}
    if not found:
        return None
    if found == {"float32"} and TF32 in str(layer.get("TacticName", "")).lower():
        return TF32
    return min(found, key=_NARROW.index)


def _described(text: str) -> str | None:
    """ "uint8" also holds "int8", and "bfloat16" "float": words are compared, narrowest first."""
    words = re.findall(r"[a-z0-9]+", text)
    return next((type_ for type_ in _NARROW if set(_SPELLINGS[type_]) & set(words)), None)
