"""What a network costs: its parameters, and its multiply-accumulates per image.

Counted operators are torch's flop counter's: convolutions, transposed convolutions, matrix products
(linear layers too) and attention. Everything else (normalisation, activations, pooling, resizing,
additions) is left out, as publications do.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(module: nn.Module) -> int:
    """Numbers in the module's parameters, frozen ones included, shared ones once; buffers (running
    statistics) are none."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_macs(module: nn.Module, size: tuple[int, int], channels: int = 3) -> int:
    """Multiply-accumulates of one forward in evaluation mode on a batch of one.

    size: (H, W) in pixels of the image, or of the map [1, channels, H, W] where `module` is a part
    of a network. Nothing is computed where the forward works on the meta device; a network whose
    forward needs real values (tensors outside its state, decisions by data) runs once on its own
    device. The module is left as it was. Raises what the forward raises at this size.
    """
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    some = next(module.parameters(), torch.empty(0))
    shape = (1, channels, *size)
    with _evaluating(module):
        meta = {name: torch.empty_like(value, device="meta") for name, value in state.items()}
        try:
            return _counted(module, meta, torch.empty(shape, dtype=some.dtype, device="meta"))
        except (RuntimeError, NotImplementedError):
            # Also for sizes that do not fit: the real device then says so with a real message.
            return _counted(module, state, torch.zeros(shape, dtype=some.dtype, device=some.device))


def _counted(module: nn.Module, state: dict[str, Tensor], images: Tensor) -> int:
    with (
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        FlopCounterMode(display=False) as counter,
    ):
        functional_call(module, state, (images,))
    return counter.get_total_flops() // 2


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """The module in evaluation mode inside the block; every part gets its own mode back."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
