"""Graph simplification that looks at structure only, never at the values of weights.

The exporter's own optimiser also drops biases that happen to be zero, merges weights that happen
to be equal and removes multiplications by weights that happen to be one: two networks of one
architecture then give two graphs. Here only constants that the code wrote (shapes, pads, axes)
steer a rewrite, so the graph follows from the architecture.
"""

import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript import optimizer, rewriter
from onnxscript.rewriter.rules import common as rules

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
