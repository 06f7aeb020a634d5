"""The cost of a network: its parameters, and its multiply-accumulates per image.

Counted operators are torch's flop counter's: convolutions, transposed convolutions, matrix products
(linear layers too) and attention. Everything else (normalisation, activations, pooling, resizing,
additions) is left out, as publications do.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from srdeploy.models.tracing import Size, undisturbed


def count_parameters(module: nn.Module) -> int:
    """Numbers in the module's parameters, frozen ones included, shared ones once; buffers (running
    statistics) are none."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_macs(module: nn.Module, size: Size, channels: int = 3) -> int:
    """Multiply-accumulates of one forward in evaluation mode on a batch of one.

    size: (H, W) in pixels of the image, or of the map [1, channels, H, W] where `module` is a part
    of a network. Nothing is computed where the forward works on the meta device; a network whose
    forward needs real values (tensors outside its state, decisions by data) runs once on its own
    device. The module is left as it was. Raises what the forward raises at this size.
    """
    return count_macs_by_module(module, size, channels)[""]


def count_macs_by_module(module: nn.Module, size: Size, channels: int = 3) -> dict[str, int]:
    """`count_macs` of every sub-module that has any, by dotted name; "" is the whole."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    with undisturbed(module), torch.no_grad():
        meta = {name: torch.empty_like(value, device="meta") for name, value in state.items()}
        shape = (1, channels, *size)
        try:
            return _counted(module, meta, torch.empty(shape, dtype=like.dtype, device="meta"))
        except (RuntimeError, NotImplementedError):
            # Sizes that do not fit fail here too, and then once more with a message about them.
            return _counted(module, state, torch.zeros(shape, dtype=like.dtype, device=like.device))


def _counted(module: nn.Module, state: dict[str, Tensor], images: Tensor) -> dict[str, int]:
    # Entered last, ShapesAlone sees operators first: the counter would decompose them.
    with FlopCounterMode(display=False) as counter, ShapesAlone():  # type: ignore[no-untyped-call]
        functional_call(module, state, (images,))
    macs = {"": counter.get_total_flops() // 2}
    for name, flops in counter.get_flop_counts().items():
        root, _, inner = name.partition(".")
        if inner and root == type(module).__name__:
            macs[inner] = sum(flops.values()) // 2
    return macs


class ShapesAlone(TorchDispatchMode):
    """Inside the block, common operators on meta tensors give their results' shapes at once.

    torch works these shapes out with decompositions in Python, up to 30 ms for one operator; a
    large network has hundreds. Tensors with values are computed as ever.
    """

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        shape_of = _SHAPES.get(operator)
        if shape_of is not None and args[0].is_meta:
            found = shape_of(*args)
            if found is not None:
                return found
        return operator(*args, **(kwargs or {}))


def _empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device="meta")


def _normalised(features: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _same(features), _empty(features, (0,)), _empty(features, (0,))


def _same(features: Tensor) -> Tensor:
    return _empty(features, features.shape)


def _sum(features: Tensor, other: Any) -> Tensor | None:
    alike = isinstance(other, Tensor) and other.is_meta and other.dtype == features.dtype
    return _same(features) if alike and other.shape == features.shape else None


def _resized(features: Tensor, size: list[int], *_: Any) -> Tensor:
    return _empty(features, (*features.shape[:2], *size))


def _drawn(values: Tensor, *_: Any) -> Tensor:
    return values


_SHAPES: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.native_batch_norm.default: _normalised,
    torch.ops.aten.relu.default: _same,
    torch.ops.aten.add.Tensor: _sum,
    torch.ops.aten.upsample_bilinear2d.default: _resized,
    torch.ops.aten.upsample_nearest2d.default: _resized,
    torch.ops.aten.normal_.default: _drawn,
}
