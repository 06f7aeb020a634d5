"""A torch module as an ONNX file: one opset, dynamic sizes, canonical names, the spec in the
metadata.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnx
import torch
from torch import nn

from srdeploy import __version__
from srdeploy.deployable import InputKind, OutputKind
from srdeploy.errors import UserError
from srdeploy.export.canonical import canonicalise
from srdeploy.export.lowering import lowered_in_place
from srdeploy.export.simplify import simplify
from srdeploy.files import write_whole
from srdeploy.serve.signature import INPUT_KEY, OUTPUT_KEY, VERSION_KEY
from srdeploy.spec import ONNX_KEY, Spec

OPSET = 20
NETWORK_KEY = "srdeploy.network"
INPUT_NAME = "images"

_PROTOBUF_LIMIT = 2**31 - 1
_LARGEST_SIDE = 2**15
"""Sizes above this are not traced for: a guard such as H*W < 2**31 must not fail the export."""


def output_names_of(output: OutputKind) -> list[str]:
    """Names of the deployed graph's outputs."""
    return ["labels", "logits"] if output == "both" else [output]


def export_onnx(
    module: nn.Module,
    spec: Spec,
    path: Path,
    *,
    input: InputKind = "uint8",
    output: OutputKind = "labels",
    output_names: Sequence[str] | None = None,
    description: Mapping[str, str] | None = None,
) -> None:
    """Writes `module` (a `Deployable`, or anything with its input and outputs) to `path` as one
    .onnx file.

    images: uint8 [N, H, W, 3], or float32 [N, 3, H, W] for input="float32"; N is dynamic, and so
    are H and W unless the spec has one size alone.
    `output_names` name a module's several outputs; by default they follow from `output`: labels,
    logits or both. `description` is added to the metadata beside the spec. Equal weights give
    equal bytes. The module is traced in evaluation mode and left as it was. Raises UserError where
    it can't be traced or is larger than 2 GiB.
    """
    names = list(output_names) if output_names is not None else output_names_of(output)
    model = _traced(module, spec, input, names)
    canonicalise(model, _parameter_names(module))
    _name_axes(model.graph, names)
    metadata = {
        ONNX_KEY: spec.to_json(),
        INPUT_KEY: input,
        OUTPUT_KEY: output if output_names is None else ",".join(names),
        VERSION_KEY: __version__,
        **(description or {}),
    }
    onnx.helper.set_model_props(model, dict(sorted(metadata.items())))
    content = model.SerializeToString(deterministic=True)
    onnx.checker.check_model(content, full_check=False)  # of the model, it would serialise it again
    write_whole(path, content)


def _traced(
    module: nn.Module, spec: Spec, input: InputKind, output_names: list[str]
) -> onnx.ModelProto:
    """The exporter's graph, simplified, with its metadata still on it."""
    least = spec.input.smallest
    height, width = max(64, least[0]), max(96, least[1])
    if height == width:
        width += 32  # equal sides would let the tracer take H for W
    if spec.input.fixed:
        height, width = least
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    dtype = torch.uint8 if input == "uint8" else torch.float32
    images = torch.zeros((2, 3, height, width), dtype=dtype, device=device)
    if input == "uint8":
        # Channels last to the eye alone: the tracer reasons about strides, and maps in the usual
        # order of axes cost it half the time. The graph says nothing about strides.
        images = images.permute(0, 2, 3, 1)
    first = 1 if input == "uint8" else 2
    axes = {0: torch.export.Dim("N", min=1, max=_LARGEST_SIDE)}
    if not spec.input.fixed:
        axes[first] = torch.export.Dim("H", min=least[0], max=_LARGEST_SIDE)
        axes[first + 1] = torch.export.Dim("W", min=least[1], max=_LARGEST_SIDE)
    with _evaluation(module), _quiet_exporter(), lowered_in_place():
        try:
            program = torch.onnx.export(
                module,
                (images,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT_NAME],
                output_names=output_names,
                dynamic_shapes=(axes,),
                external_data=False,
                optimize=False,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise UserError(
                f"{type(module).__name__} can't be exported to ONNX: {_root_cause(error)}"
            ) from error
        assert program is not None  # for the type checker: dynamo=True always returns a program
        simplify(program.model)
        return _serialised(program)


def _serialised(program: torch.onnx.ONNXProgram) -> onnx.ModelProto:
    weights = sum(
        value.const_value.nbytes
        for value in program.model.graph.initializers.values()
        if value.const_value is not None
    )
    if weights >= _PROTOBUF_LIMIT:
        raise UserError(
            f"the weights take {weights / 2**30:.1f} GiB: one ONNX file holds at most 2 GiB"
        )
    return program.model_proto


def _parameter_names(module: nn.Module) -> set[str]:
    parameters = module.named_parameters(remove_duplicate=False)
    buffers = module.named_buffers(remove_duplicate=False)
    return {name for name, _ in (*parameters, *buffers)}


def _name_axes(graph: onnx.GraphProto, output_names: list[str]) -> None:
    """N, H and W on the images and on full-size outputs; derived sizes (H/4) have no name of their
    own.
    """
    for value in (*graph.input, *graph.output):
        for position, axis in enumerate(value.type.tensor_type.shape.dim):
            if axis.HasField("dim_param") and axis.dim_param not in ("N", "H", "W"):
                axis.ClearField("dim_param")
            if position == 0:
                axis.dim_param = "N"
    rank = {"labels": 3, "logits": 4}
    for value in graph.output:
        dims = value.type.tensor_type.shape.dim
        if value.name in output_names and rank.get(value.name) == len(dims):
            for axis, name in zip(dims[-2:], ("H", "W"), strict=True):
                if not axis.HasField("dim_value"):  # the network's one size
                    axis.dim_param = name


@contextmanager
def _evaluation(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for the block; every sub-module gets its own mode back."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Holds back what the exporter says about itself: absent torchvision operators, its own
    deprecations.
    """
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*LeafSpec", category=FutureWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            yield
    finally:
        registration.setLevel(level)


def _root_cause(error: BaseException) -> str:
    """First line of what went wrong at the bottom of the exporter's chain of errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
