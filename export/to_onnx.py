"""A torch module as an ONNX file: one opset, dynamic sizes, canonical names, the spec in the
metadata.
"""

import ast
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto
from onnxscript import optimizer, rewriter
from onnxscript.rewriter.rules import common as rules
from torch import nn

from srdeploy import __version__
from srdeploy.deployable import InputKind, OutputKind
from srdeploy.errors import UserError
from srdeploy.export.lowering import lowered_in_place
from srdeploy.files import write_whole
from srdeploy.graph.index import Names, bodies_of, captured_by
from srdeploy.graph.operators import MODULE_LAYERS
from srdeploy.graph.signature import INPUT_KEY, OUTPUT_KEY, VERSION_KEY
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
    are H and W unless the spec has only one size.
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
        # Channels last only to the eye: the tracer reasons about strides, and maps in the usual
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


# The canonical form: stable names and order, and nothing about the machine that exported it.

PRODUCER = "srdeploy"
_SCOPES = "pkg.torch.onnx.name_scopes"


def canonicalise(model: ModelProto, parameters: Collection[str]) -> None:
    """Renames nodes after their modules, constants after their nodes; strips traces and metadata.
    In place.

    `parameters` are the module's parameter and buffer names: initialisers with these names keep
    them. Graph inputs and outputs keep their names too. A node is called e.g.
    "network/backbone/layer1/0/conv1/Conv", its result "network/backbone/layer1/0/conv1/Conv_out".
    The exporter's metadata must still be there.
    """
    model.producer_name, model.producer_version = PRODUCER, ""
    model.ClearField("metadata_props")
    opsets = sorted(model.opset_import, key=lambda opset: opset.domain)
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    names = Names(value.name for value in (*model.graph.input, *model.graph.output))
    model.graph.name = PRODUCER
    _rename(model.graph, names, frozenset(parameters), {}, "")
    _strip(model.graph)
    for function in model.functions:
        function.ClearField("metadata_props")
        for node in function.node:
            node.ClearField("metadata_props")


def _rename(
    graph: GraphProto,
    names: Names,
    parameters: Collection[str],
    outer: dict[str, str],
    path: str,
) -> None:
    """Gives every node and value of `graph` its name; `outer` maps the names of enclosing
    graphs.
    """
    values = dict(outer)
    for value in (*graph.input, *graph.output):
        values[value.name] = value.name if not path else names.fresh(f"{path}/{value.name}")
    constants = {tensor.name for tensor in graph.initializer} - set(values)
    for tensor in graph.initializer:
        if tensor.name in parameters and tensor.name not in values:
            values[tensor.name] = names.fresh(tensor.name)
            constants.discard(tensor.name)
    used: list[str] = []
    for node in graph.node:
        node.name = names.fresh(_wish(node, parameters, path))
        for index, name in enumerate(node.input):
            if name in constants and name not in values:
                values[name] = names.fresh(_constant_wish(node, index, parameters))
            if name:
                node.input[index] = values[name]
                used.append(values[name])
        # Values of enclosing graphs that only a body reads need their name before the body is
        # visited.
        for name in captured_by(node):
            if name in constants and name not in values:
                values[name] = names.fresh(f"{node.name}_const")
            used.append(values.get(name, name))
        for index, name in enumerate(node.output):
            if name and name not in values:
                values[name] = names.fresh(f"{node.name}_out" + (str(index) if index else ""))
            node.output[index] = values[name] if name else ""
        for body in bodies_of(node):
            _rename(body, names, parameters, values, node.name)
        attributes = sorted(node.attribute, key=lambda attribute: attribute.name)
        del node.attribute[:]
        node.attribute.extend(attributes)
    for value in (*graph.input, *graph.output):
        value.name = values[value.name]
    for tensor in graph.initializer:
        tensor.name = values.get(tensor.name, tensor.name)
    position = {name: index for index, name in reversed(list(enumerate(used)))}
    tensors = sorted(graph.initializer, key=lambda t: (position.get(t.name, len(used)), t.name))
    del graph.initializer[:]
    graph.initializer.extend(tensors)


def _constant_wish(node: NodeProto, index: int, parameters: Collection[str]) -> str:
    """Name of a constant that the module does not name: after the node that reads it first."""
    weight = node.input[1] if node.op_type in MODULE_LAYERS and index == 2 else ""
    if weight in parameters:
        # Folding BatchNorm into a convolution without a bias made this one: it is that
        # convolution's bias.
        return weight.rpartition(".")[0] + ".bias"
    return f"{node.name}_in{index}"


def _wish(node: NodeProto, parameters: Collection[str], path: str) -> str:
    """module/path/Operator. A weighted operator belongs to the module that owns its weight."""
    scope = _scope(node)
    if node.op_type in MODULE_LAYERS and len(node.input) > 1 and node.input[1] in parameters:
        scope = node.input[1].rpartition(".")[0]
    parts = [path] if path else []
    return "/".join([*parts, *(part for part in scope.split(".") if part), node.op_type])


def _scope(node: NodeProto) -> str:
    """Dotted path of the deepest module that the exporter recorded for the node; "" for the
    root.
    """
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            scopes: list[str] = ast.literal_eval(entry.value)
            modules = [scope for scope in scopes[:-1] if not scope.startswith("_empty_nn_module")]
            return modules[-1] if modules else ""
    return ""


def _strip(graph: GraphProto) -> None:
    """Removes doc strings, metadata and the shapes of intermediate values, which restate what can
    be inferred.
    """
    graph.ClearField("value_info")
    graph.ClearField("metadata_props")
    graph.doc_string = ""
    for value in (*graph.input, *graph.output):
        _strip_value(value)
    for tensor in graph.initializer:
        tensor.ClearField("metadata_props")
        tensor.ClearField("doc_string")
    for node in graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
        for attribute in node.attribute:
            attribute.ClearField("doc_string")
        for body in bodies_of(node):
            _strip(body)


def _strip_value(value: ValueInfoProto) -> None:
    value.ClearField("metadata_props")
    value.ClearField("doc_string")


# Simplification looks at structure only, never at the values of weights. The exporter's own
# optimiser also drops biases that happen to be zero, merges weights that happen to be equal and
# removes multiplications by weights that happen to be one: two networks of one architecture then
# give two graphs. Here only constants that the code wrote (shapes, pads, axes) steer a rewrite.

_RULES = (
    rules.cast_cast_rule,
    rules.cast_constant_of_shape_rule,
    rules.cast_constant_of_shape_without_value_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.dropout_inference_rule,
    rules.flatten_to_reshape_rule,
    rules.fuse_batchnorm_into_conv_rule,
    rules.fuse_batchnorm_into_conv_transpose_rule,
    rules.fuse_batchnorm_into_gemm_rule,
    rules.fuse_pad_into_conv_rule,
    rules.materialize_reshape_shape_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.no_op_transpose_rule,
    rules.reshape_reshape_rule,
    rules.slice_split_rule,
    rules.squeeze_reshape_1d_rule,
    rules.successive_relu_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
)
_ROUNDS = 3
"""Folding makes room for rewrites and the other way round; real networks settle after two."""


def simplify(model: ir.Model) -> None:
    """Folds constants and BatchNorm, merges repeated shape arithmetic, drops what no output needs.
    In place.
    """
    passes.InlinePass()(model)
    for _ in range(_ROUNDS):
        optimizer.fold_constants(model, onnx_shape_inference=True)
        rewriter.rewrite(model, _RULES)
    passes.IdentityEliminationPass()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.LiftSubgraphInitializersToMainGraphPass()(model)
    _merge_integer_constants(model.graph)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)
    passes.OutputFixPass()(model)
    passes.NameFixPass()(model)


def _merge_integer_constants(graph: ir.Graph) -> None:
    """One initialiser per integer value: axes and sizes come from code, so merging them is
    structural.
    """
    first: dict[tuple[object, ...], ir.Value] = {}
    for value in list(graph.initializers.values()):
        constant = value.const_value
        if constant is None or not constant.dtype.is_integer() or value.is_graph_output():
            continue
        key = (constant.dtype, tuple(constant.shape.numpy()), constant.tobytes())
        kept = first.setdefault(key, value)
        if kept is not value:
            ir.convenience.replace_all_uses_with(value, kept)
            graph.initializers.pop(value.name or "")
