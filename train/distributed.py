"""The processes of a training run: torchrun's, or only this one.

    torchrun --nproc-per-node 2 -m srdeploy train DATA --out RUN

Every process computes a share of each batch; rank 0 leads: only it writes and speaks. An error
anywhere ends the job with one line, said by the process that failed, or by the first that misses
one that was killed.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from inspect import signature
from time import sleep
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from srdeploy import console
from srdeploy.errors import UserError
from srdeploy.models.imported import is_imported
from srdeploy.train.config import TrainConfig
from srdeploy.train.regulation import Losses, SelfRegulation

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""The environment variables that torchrun sets for each process."""
SPOKEN = "srdeploy/spoken"
"""Key of torchrun's store: how many processes have met an error; the first one says so."""
MISSED = "srdeploy/misses-a-process/"
"""Prefix of keys of the store, one for each rank that lost its connection to another."""
PATIENCE = 1.0
"""Seconds in which all processes that are alive notice that one is not."""
_LOST = ("connection closed", "connection reset", "connection refused", "broken pipe", "peer")


@dataclass(frozen=True)
class World:
    """This process among all of a run. All methods but `seed` are called by every process at the
    same point; with one process they cost nothing."""

    rank: int = 0
    """0 .. size - 1."""
    size: int = 1
    local_rank: int = 0
    """Number of this process on its machine: the number of its GPU."""

    @property
    def leads(self) -> bool:
        """True if this process writes the run's files and prints messages."""
        return self.rank == 0

    def share(self, batch: int) -> int:
        """How many of a batch's images each process takes. Raises UserError where they don't
        divide."""
        if batch % self.size:
            raise UserError(
                f"batch {batch} can't be dealt out to {self.size} processes evenly: it counts the "
                f"images of all of them; give a --batch that is divisible by {self.size}"
            )
        return batch // self.size

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Equally many values of every process, in the order of ranks."""
        if self.size == 1:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.float64)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine)
        return [row.tolist() for row in found]

    def sum(self, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The processes' counts added up, exactly; int64 of any shape, equal everywhere."""
        if self.size == 1:
            return counts
        total = torch.from_numpy(counts.copy())
        dist.all_reduce(total)
        return total.numpy()

    def sum_tensor(self, values: Tensor) -> None:
        """Adds up the processes' tensors, in place, on their device; alone it is left as it is."""
        if self.size > 1:
            dist.all_reduce(values)

    def any(self, flag: bool) -> bool:
        """True if `flag` is true on any process."""
        return any(row[0] for row in self.gather([float(flag)]))

    def wait(self) -> None:
        """Waits until every process arrives here."""
        self.any(False)

    def require_same(self, text: str, what: str) -> None:
        """Raises UserError where another process has another `text` than the leader."""
        if self.size == 1:
            return
        texts: list[str | None] = [None] * self.size
        dist.all_gather_object(texts, text)
        for rank, other in enumerate(texts):
            if other != texts[0]:
                raise UserError(
                    f"rank {rank} of {self.size} has {what} than rank 0: start all processes with "
                    "the same flags, and give all machines the same data"
                )

    def seed(self, seed: int, step: int) -> None:
        """Torch's random numbers for a step, other ones on every rank.

        They follow from seed, rank and step, so that a checkpoint need not hold them. The leader's
        go on as those of a process alone do.
        """
        if not self.leads:
            words = np.random.SeedSequence([seed, self.rank, step]).generate_state(2)
            torch.manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size}"


ALONE = World()
"""One process, without torchrun."""


@contextmanager
def joined() -> Iterator[World]:
    """Joins torchrun's other processes for the block; without them, `ALONE`.

    Tensors on the CPU travel by gloo, those on a GPU by NCCL. Processes that follow are silent.
    Where one of several meets a UserError, or misses another, one of them says so with its rank,
    and all end with exit code 2. Raises UserError for an environment that is none of torchrun's.
    """
    world = found_world()
    if world.size == 1:
        yield ALONE
        return
    cuda = torch.cuda.is_available() and dist.is_nccl_available()
    if cuda and world.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(world.local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    if not world.leads:
        console.follow()
    try:
        yield world
        # A leader that fails in its last writes fails the job: the others don't end well before.
        world.wait()
    except Exception as error:
        words = _last_words(world, error)
        if words is not None:
            console.error(words)
        leave(2)
    else:
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """Ends a process of several with `code`, now that all is written and said.

    Without the interpreter's own end, during which torch's threads aborted one process in six
    ("terminate called without an active exception"): the job would count as failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def found_world() -> World:
    """The place that torchrun's environment gives this process. Raises UserError where it is no
    number."""
    if any(name not in os.environ for name in TORCHRUN):
        return ALONE
    try:
        rank, size, local = (int(os.environ[name]) for name in TORCHRUN[:3])
    except ValueError as error:
        raise UserError(
            "RANK, WORLD_SIZE and LOCAL_RANK in the environment are to be numbers: start with "
            "torchrun, or unset them"
        ) from error
    return World(rank, size, local)


def lost(error: BaseException) -> bool:
    """True if the error means that another process can no longer be reached."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in _LOST)


def _last_words(world: World, error: Exception) -> str | None:
    """What this process has to say about its end: the first one that fails speaks, the others are
    silent (None). What is a mistake of ours is raised again."""
    if threading.current_thread() is threading.main_thread():
        # torchrun ends the others as soon as one has gone: not before the line is out.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    store = dist.distributed_c10d._get_default_store()
    missing: list[int] = []
    try:
        if lost(error):
            store.set(f"{MISSED}{world.rank}", "")
        first = store.add(SPOKEN, 1) == 1
        if lost(error) and first:
            sleep(PATIENCE)
            ranks = range(world.size)
            missing = [rank for rank in ranks if not store.check([f"{MISSED}{rank}"])]
    except RuntimeError:  # the store went away with its machine
        first = True
    if not first:
        return None
    if lost(error):
        who = " and ".join(f"rank {rank}" for rank in missing) or "another process"
        return (
            f"{who} of {world.size} ended without a word (killed, or its machine is gone): start "
            "all processes again with --resume"
        )
    if isinstance(error, UserError):
        return f"{world}: {error}"
    raise error


# BatchNorm's running statistics with several processes


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


# A regulated network on several processes: gradients by DistributedDataParallel, and running
# statistics.


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
