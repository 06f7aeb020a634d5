"""EMA: a moving average of network and exits over the steps, often steadier than the last weights
(Polyak and Juditsky, 1992)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """A float32 shadow of a module's parameters and buffers, as of when it was made.

    Normalisation's statistics are averaged along, so that they fit the weights beside them; what is
    no floating-point number (a count of batches, say) is the latest.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        """decay: share of the old average that stays in a step, 0..1, once it has seen enough
        steps."""
        self.decay = decay
        self._module = module
        self.shadow = {
            name: tensor.detach().to(torch.float32 if tensor.is_floating_point() else None).clone()
            for name, tensor in _tensors(module).items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after step number `step`, counted from 1.

        The first steps stay less long, min(decay, (1 + step) / (10 + step)): the random start would
        otherwise last for 1 / (1 - decay) steps.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        shadows: list[Tensor] = []
        latest: list[Tensor] = []
        for name, tensor in _tensors(self._module).items():
            if tensor.is_floating_point():
                shadows.append(self.shadow[name])
                latest.append(tensor.detach().float())
            else:
                self.shadow[name].copy_(tensor)
        # All tensors in a few kernels, where the device can.
        get_ema_multi_avg_fn(decay)(shadows, latest, step)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Puts the average into the module while the block runs, then its own weights back, bit for
        bit."""
        tensors = _tensors(self._module)
        own = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        try:
            _fill(tensors, self.shadow)
            yield
        finally:
            _fill(tensors, own)

    def load(self, shadow: Mapping[str, Tensor]) -> None:
        """Goes on from a `shadow` that was kept. Raises KeyError and RuntimeError where it does not
        fit."""
        if shadow.keys() != self.shadow.keys():
            odd = sorted(shadow.keys() ^ self.shadow.keys())
            raise KeyError(f"the average's tensors are others: {odd[0]}")
        _fill(self.shadow, shadow)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """What is saved of a module, by name, without what is no tensor (a module's extra state)."""
    return {n: value for n, value in module.state_dict().items() if isinstance(value, Tensor)}


@torch.no_grad()
def _fill(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(values[name])
