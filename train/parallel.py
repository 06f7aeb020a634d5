"""A regulated network on several processes: gradients by DistributedDataParallel, and running
statistics."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from inspect import signature
from typing import Any

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from srdeploy.models.imported import is_imported
from srdeploy.train.config import TrainConfig
from srdeploy.train.distributed import World
from srdeploy.train.regulation import Losses, SelfRegulation
from srdeploy.train.running_statistics import RunningStatistics


class Parallel:
    """One process's side of a network that several train; `regulated` itself stays as it is."""

    def __init__(self, regulated: SelfRegulation, config: TrainConfig, world: World) -> None:
        """regulated: placed, in training mode; takes the leader's weights."""
        self.world = world
        self._regulated = regulated
        self._statistics = RunningStatistics(regulated, world)
        buffers: dict[str, Any] = {_buffers_option(): False}  # they are equal already
        self._wrapped = DistributedDataParallel(
            regulated,
            find_unused_parameters=may_have_idle_parameters(config),
            **buffers,
        )

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Around the forward and backward pass of a micro-batch; the processes' gradients meet, as
        their mean, in the `last` one of a step."""
        with nullcontext() if last else self._wrapped.no_sync(), self._statistics.merged():
            yield

    def losses(
        self,
        images: Tensor,
        labels: Tensor,
        progress: float,
        confidence: Tensor | None = None,
    ) -> Losses:
        """This process's losses, as `SelfRegulation.losses`."""
        return self._regulated.losses_of(self._wrapped(images), labels, progress, confidence)


def may_have_idle_parameters(config: TrainConfig) -> bool:
    """Whether a step may leave a parameter without gradient, which takes a search each time.

    Parts of exits whose loss weighs nothing; and nobody knows what a network of the user's has.
    """
    settings = config.regulation
    idle_exits = settings.enabled and not (settings.seg_weight > 0 and settings.cls_weight > 0)
    return idle_exits or is_imported(config.network.name)


def _buffers_option() -> str:
    """The name that torch has for sending rank 0's buffers around in every forward pass."""
    new = "forward_sync_buffers"
    return new if new in signature(DistributedDataParallel).parameters else "broadcast_buffers"
