"""A traced program in the operators that have a translation to ONNX, without tracing it again.

torch.onnx.export decomposes every program by running it once more with symbolic sizes, which takes
as long as the trace itself. A segmentation network in evaluation mode needs only a handful of
decompositions, each of which replaces one node by one or two others: here they are done in place. A
program with any other operator is left to torch.

What is written is the same, byte for byte (a test compares them), but for flattened axes: torch
computes the new size from the images' size, here it is read off the tensor. Either way, one
architecture always goes one way, so that its graph stays a function of only the architecture.

This takes the place of code that torch keeps to itself, which may change with any version. So it is
done only with the versions in CHECKED; any other exports by torch's public way, in more time.
"""

import hashlib
import inspect
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

_aten = torch.ops.aten

CHECKED: dict[str, str] = {
    "2.13.0": "2817d16f52c441f7d94f99512ff010274e69100ce6c511bc249cdc684cdb4a81",
}
"""Version of torch -> what `digest_of_torch` gave when both ways were found to write equal files.

To add one: write its line, then run tests/export/test_lowering.py with it.
"""

DIRECT: frozenset[Any] = frozenset(
    {
        _aten.add.Tensor,
        _aten.argmax.default,
        _aten.bitwise_not.default,
        _aten.cat.default,
        _aten.conv2d.default,
        _aten.gt.Tensor,
        _aten.hardtanh.default,
        _aten.matmul.default,
        _aten.max_pool2d.default,
        _aten.mean.dim,
        _aten.mul.Tensor,
        _aten.new_zeros.default,
        _aten.pad.default,
        _aten.permute.default,
        _aten.pixel_shuffle.default,
        _aten.relu.default,
        _aten.reshape.default,
        _aten.sigmoid.default,
        _aten.slice.Tensor,
        _aten.softmax.int,
        _aten.stack.default,
        _aten.sub.Tensor,
        _aten.sym_size.int,
        _aten.transpose.int,
        _aten.unsqueeze.default,
        _aten.upsample_bilinear2d.vec,
        _aten.upsample_nearest2d.vec,
        _aten.where.self,
        operator.add,
        operator.floordiv,
        operator.mul,
        operator.sub,
        torch.sym_max,
        torch.sym_min,
    }
)
"""Operators that torch's decomposition for ONNX leaves as they are."""

_PROMOTING: dict[Any, slice] = {
    _aten.add.Tensor: slice(2),
    _aten.bitwise_and.Tensor: slice(2),
    _aten.bitwise_not.default: slice(1),
    _aten.bitwise_or.Tensor: slice(2),
    _aten.cat.default: slice(1),
    _aten.gt.Tensor: slice(2),
    _aten.hardtanh.default: slice(1),
    _aten.mul.Tensor: slice(2),
    _aten.relu.default: slice(1),
    _aten.sigmoid.default: slice(1),
    _aten.sub.Tensor: slice(2),
    _aten.where.self: slice(1, 3),
}
"""Those among the operators written here that bring operands to one type, and which operands."""

_ASSERTIONS = frozenset({_aten._assert_scalar.default, _aten._assert_tensor_metadata.default})


@contextmanager
def lowered_in_place() -> Iterator[None]:
    """While the block runs, programs that need few decompositions are decomposed by `lower`, and
    those that mix no types are not interpreted once more to bring operands to one type.

    Changes nothing unless torch `is_checked`.
    """
    if not is_checked():
        yield
        return
    from torch.onnx._internal.exporter import _fx_passes  # other versions may have no such module

    promote = _fx_passes.insert_type_promotion_nodes

    def promote_where_mixed(module: GraphModule) -> None:
        if not module.meta.get(_ONE_TYPE, False):
            promote(module)

    with (
        mock.patch.object(ExportedProgram, "run_decompositions", _lowered_or_decomposed),
        mock.patch.object(_fx_passes, "insert_type_promotion_nodes", promote_where_mixed),
    ):
        yield


def is_checked() -> bool:
    """Whether this torch is in CHECKED and has the code that it had then."""
    version = torch.__version__.partition("+")[0]  # what follows says which devices it is built for
    if version not in CHECKED:
        return False  # without a look at private modules, which may not be there
    try:
        return digest_of_torch() == CHECKED[version]
    except OSError:  # installed without its source
        return False


def digest_of_torch() -> str:
    """SHA-256 of the source of the modules in which functions are replaced here, and of those that
    say what the functions do."""
    from torch.onnx._internal.exporter import _decomp, _fx_passes
    from torch.onnx._internal.fx.passes import type_promotion

    digest = hashlib.sha256()
    for module in (torch.export.exported_program, _fx_passes, _decomp, type_promotion):
        digest.update(inspect.getsource(module).encode())
    return digest.hexdigest()


def lower(program: ExportedProgram) -> bool:
    """Rewrites the program's graph in place and returns True; or changes nothing: False.

    False where a node is neither in DIRECT nor has a rewrite here that fits its arguments.
    """
    graph = program.graph
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    idle = _only_asserted(nodes)
    for node in nodes:
        fits = _REWRITES[node.target][0] if node.target in _REWRITES else _never
        if not (node in idle or node.target in DIRECT or fits(node)):
            return False
    _hoist_asserted_sizes(nodes, idle)
    for node in reversed(nodes):
        if node in idle:
            graph.erase_node(node)
        elif node.target in _REWRITES:
            _REWRITES[node.target][1](node)
    program.graph_module.recompile()
    return True


_decompose = ExportedProgram.run_decompositions
_ONE_TYPE = "srdeploy.one_type"
"""Marks a graph that was lowered here and whose operators meet only operands of one type."""


def _lowered_or_decomposed(program: ExportedProgram, *args: Any, **options: Any) -> ExportedProgram:
    if not lower(program):
        decomposed: ExportedProgram = _decompose(program, *args, **options)
        return decomposed
    module = program.graph_module
    module.meta[_ONE_TYPE] = all(map(_meets_one_type, module.graph.nodes))
    return program


def _meets_one_type(node: Node) -> bool:
    """Whether torch's type promotion leaves the node alone, however it goes about it."""
    operands: list[Any] = []
    for argument in node.args[_PROMOTING.get(node.target, slice(0))]:
        operands += argument if isinstance(argument, list | tuple) else [argument]
    types = {_dtype(operand) for operand in operands}
    return types <= {torch.float32} or types == {torch.bool}


def _dtype(operand: Any) -> torch.dtype | None:
    """None for sizes and numbers, which promotion may turn into tensors."""
    value = operand.meta["val"] if isinstance(operand, Node) else operand
    return value.dtype if isinstance(value, torch.Tensor) else None


def _only_asserted(nodes: list[Node]) -> set[Node]:
    """Assertions about sizes, and the nodes whose results only they read: ONNX has no place for
    them."""
    idle: set[Node] = set()
    for node in reversed(nodes):
        if node.target in _ASSERTIONS or all(user in idle for user in node.users):
            idle.add(node)
    return idle


def _hoist_asserted_sizes(nodes: list[Node], idle: set[Node]) -> None:
    """Sizes that torch asserts something about go where its decomposition has them: to the top,
    into no module. In the trace they stand in whichever module came first."""
    sizes = [node for node in nodes if node.target is _aten.sym_size.int]
    rest = [node for node in nodes if node not in sizes]
    top = set(sizes)
    asserted = {node for node in rest if node.target is _aten._assert_scalar.default}
    for node in reversed(rest):
        if node in asserted:
            asserted.update(node.all_input_nodes)
    for node in rest:
        if node in asserted and node not in idle and top.issuperset(node.all_input_nodes):
            rest[0].prepend(node)
            node.meta["nn_module_stack"] = sizes[0].meta["nn_module_stack"]
            top.add(node)


def _always(_node: Node) -> bool:
    return True


def _never(_node: Node) -> bool:
    return False


def _argument(node: Node, position: int, name: str, default: Any) -> Any:
    """An argument of a call, which may have been given by position, by name or not at all."""
    if position < len(node.args):
        return node.args[position]
    return node.kwargs.get(name, default)


def _is_inner(node: Node) -> bool:
    """Whether no output of the program is called as this node is: another may take its place."""
    return all(user.op != "output" for user in node.users)


def _normalises_with_statistics(node: Node) -> bool:
    statistics = node.args[3:5]
    return len(node.args) >= 8 and None not in statistics and not node.args[5] and _is_inner(node)


def _lower_batch_norm(node: Node) -> None:
    """(features, weight, bias, mean, variance, training, momentum, eps, cudnn): only the first of
    the three results is used in evaluation."""
    value = node.meta["val"]
    node.target = _aten._native_batch_norm_legit_no_training.default
    node.args = (*node.args[:5], *node.args[6:8])
    with node.graph.inserting_after(node):
        first = node.graph.call_function(operator.getitem, (node, 0))
    first.meta = {**node.meta}
    node.meta = {**node.meta, "val": (value, value.new_empty(0), value.new_empty(0))}
    node.replace_all_uses_with(first, delete_user_cb=lambda user: user is not first)


def _lower_transposed_convolution(node: Node) -> None:
    features, weight = node.args[:2]
    bias = _argument(node, 2, "bias", None)
    stride = _pair(_argument(node, 3, "stride", 1))
    padding = _pair(_argument(node, 4, "padding", 0))
    extra = _pair(_argument(node, 5, "output_padding", 0))
    groups = _argument(node, 6, "groups", 1)
    dilation = _pair(_argument(node, 7, "dilation", 1))
    node.target = _aten.convolution.default
    node.args = (features, weight, bias, stride, padding, dilation, True, extra, groups)
    node.kwargs = {}


def _pair(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value, value]


def _keep(_node: Node) -> None:
    """The operator has a translation."""


def _flattens_the_last_axes(node: Node) -> bool:
    """Flattening other axes is left to torch, which writes all the sizes of the result out."""
    return bool(_argument(node, 2, "end_dim", -1) == -1)


def _lower_conversion(node: Node) -> None:
    converted = node.all_input_nodes[0].meta["val"].dtype != node.args[1]
    if not converted and _is_inner(node):
        _leave_out(node)
        return
    node.target = _aten._to_copy.default
    node.args, node.kwargs = node.args[:1], {"dtype": node.args[1]}


def _converts(node: Node) -> bool:
    return len(node.args) == 2 and not node.kwargs


def _is_left_out(node: Node) -> bool:
    return _argument(node, 2, "train", True) is False and _is_inner(node)


def _leave_out(node: Node) -> None:
    node.replace_all_uses_with(node.all_input_nodes[0])
    node.graph.erase_node(node)


def _lower_and(node: Node) -> None:
    node.target = _aten.bitwise_and.Tensor


def _lower_or(node: Node) -> None:
    node.target = _aten.bitwise_or.Tensor


_REWRITES: dict[Any, tuple[Callable[[Node], bool], Callable[[Node], None]]] = {
    _aten.__and__.Tensor: (_always, _lower_and),
    _aten.__or__.Tensor: (_always, _lower_or),
    _aten.batch_norm.default: (_normalises_with_statistics, _lower_batch_norm),
    _aten.conv_transpose2d.input: (_always, _lower_transposed_convolution),
    _aten.dropout.default: (_is_left_out, _leave_out),
    _aten.feature_dropout.default: (_is_left_out, _leave_out),
    _aten.flatten.using_ints: (_flattens_the_last_axes, _keep),
    _aten.to.dtype: (_converts, _lower_conversion),
}
"""Operator -> whether the rewrite fits a call of it, and the rewrite, in place."""
