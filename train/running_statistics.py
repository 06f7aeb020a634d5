"""BatchNorm's running statistics where several processes train: as one process would have them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from srdeploy.errors import UserError
from srdeploy.train.distributed import World


class RunningStatistics:
    """Merges what every process's BatchNorm layers saw in a forward pass.

    Each process normalises by its own images, as each micro-batch of one process with `accumulate`
    is. One process would have updated the running statistics with one micro-batch after the other,
    in the order of ranks, and so they are put together here: averaging over ranks, or taking rank
    0's, would be as if fewer images had been seen. It takes one sum over the processes, of as many
    numbers as DistributedDataParallel's own broadcast of buffers sends.
    """

    def __init__(self, module: nn.Module, world: World) -> None:
        """module: in training mode. Raises UserError for a BatchNorm without momentum."""
        self._world = world
        self._buffers: list[Tensor] = []
        self._counts: list[Tensor] = []
        keep: list[float] = []
        if world.size > 1:
            for name, layer in module.named_modules():
                if not isinstance(layer, nn.modules.batchnorm._BatchNorm) or not layer.training:
                    continue
                # SyncBatchNorm has the same statistics on every process by itself.
                if isinstance(layer, nn.SyncBatchNorm) or not layer.track_running_stats:
                    continue
                if layer.momentum is None:
                    raise UserError(
                        f"'{name}' is a BatchNorm with momentum=None, whose statistics can't be "
                        "merged over processes: train with one process, or give it a momentum"
                    )
                for buffer in (layer.running_mean, layer.running_var):
                    assert buffer is not None
                    assert layer.num_batches_tracked is not None
                    self._buffers.append(buffer)
                    self._counts.append(layer.num_batches_tracked)
                    keep.append(1 - layer.momentum)
        self._lengths = [buffer.numel() for buffer in self._buffers]
        if self._buffers:
            device = self._buffers[0].device
            self._repeats = torch.tensor(self._lengths, device=device)
            self._keep = torch.tensor(keep, dtype=torch.float64, device=device)

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Around one forward and backward pass in training mode; nothing waits for the device."""
        if not self._buffers:
            yield
            return
        before, counted = torch.cat(self._buffers), torch.stack(self._counts)
        # From zero, what is found afterwards is this process's contribution, unrounded.
        torch._foreach_zero_(self._buffers)
        yield
        size, rank = self._world.size, self._world.rank
        runs = torch.stack(self._counts) - counted  # a layer may run several times in a pass
        total = sum(self._lengths)
        kept = (self._keep**runs).repeat_interleave(self._repeats, output_size=total)
        found = torch.cat(self._buffers) * kept ** (size - 1 - rank)
        self._world.sum_tensor(found)
        merged = found + before * kept**size
        for buffer, new in zip(self._buffers, merged.split(self._lengths), strict=True):
            buffer.copy_(new.view_as(buffer))
        # Mean and variance of a layer share one count.
        for count, new in zip(self._counts[::2], (counted + size * runs)[::2], strict=True):
            count.copy_(new)
