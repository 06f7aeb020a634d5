"""Before the first step: data, device, network and exits are opened, built and checked."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from srdeploy import console
from srdeploy.errors import UserError
from srdeploy.models.tracing import PROBE_SIZE
from srdeploy.models.weights import load_pretrained
from srdeploy.runs import (
    build_network,
    require_usable,
)
from srdeploy.spec import Spec
from srdeploy.train.config import TrainConfig
from srdeploy.train.data import TrainingData, class_weights, open_data
from srdeploy.train.device import find_device
from srdeploy.train.distributed import ALONE, World
from srdeploy.train.regulation import SelfRegulation


@dataclass(frozen=True)
class TrainingJob:
    """The parts of a run, ready to step."""

    data: TrainingData
    regulated: SelfRegulation
    weights: Tensor | None
    """Class weights float32 [K] on the CPU, or None."""
    device: torch.device
    amp: bool
    world: World = ALONE

    @property
    def spec(self) -> Spec:
        """The spec of the network's inputs and outputs."""
        return self.data.spec


def prepare(config: TrainConfig, trained: bool = False, world: World = ALONE) -> TrainingJob:
    """Opens the data and builds the network, exits and class weights; writes nothing.

    Raises UserError. The network's start depends only on config.seed: not on regulation, nor on the
    device. trained: weights will be loaded from a checkpoint, so that the pretrained file need not
    be there any more. world: the processes that train together.
    """
    # The device, and what of the configuration it can't do.
    device = find_device(config.device, world)
    world.share(config.batch)
    if config.sync_batch_norm and device.type == "cpu":
        raise UserError(
            "sync_batch_norm needs GPUs, torch has none for the CPU: give "
            "--set sync_batch_norm=false"
        )

    # The data.
    data = open_data(config)
    spec = data.spec

    # The network.
    torch.manual_seed(config.seed)
    probe_size = spec.input.near(PROBE_SIZE)
    network = build_network(config.network, spec.class_count, probe_size)
    require_usable(network, config.network, spec)
    if config.pretrained is not None and not trained:
        console.done(load_pretrained(network, config.pretrained, config.pretrained_missing))

    # The exits.
    weights = class_weights(data.training, config.class_weights)
    regulated = SelfRegulation(
        network,
        spec.class_count,
        settings=config.regulation,
        ignore_index=spec.ignore_index,
        class_weights=weights,
        probe_size=probe_size,
    )
    if config.sync_batch_norm and world.size > 1:
        # The layers' weights and names stay, and so does what is saved.
        nn.SyncBatchNorm.convert_sync_batchnorm(regulated)
    place(regulated, device, config.channels_last)
    return TrainingJob(
        data=data,
        regulated=regulated,
        weights=weights,
        device=device,
        amp=config.autocast(device.type),
        world=world,
    )


def place(regulated: nn.Module, device: torch.device, channels_last: bool) -> None:
    """Brings network and exits to `device`, in training mode, laid out as activations will be."""
    regulated.to(device).train()
    if channels_last:
        for parameter in regulated.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def describe(config: TrainConfig, job: TrainingJob) -> str:
    """One line: what is trained, how, where."""
    count = sum(parameter.numel() for parameter in job.regulated.network.parameters())
    taps = len(job.regulated.taps)
    how = f"self-regulation at {taps} exits + its own" if taps else "no regulation (baseline)"
    images = config.batch * config.accumulate
    averaged = "; the moving average of the weights is validated and saved" if config.ema else ""
    return (
        f"{config.network.name}, {count / 1e6:.2f} M parameters, {how}, on {_device_name(job)}: "
        f"{config.steps} steps of {images} images, {len(job.data.training)} to train on, "
        f"{len(job.data.validation)} to validate{averaged}"
    )


def _device_name(job: TrainingJob) -> str:
    precision = "bfloat16" if job.amp else "float32"
    if job.world.size > 1:
        precision = f"{job.world.size} processes, {precision}"
    if job.device.type == "cuda":
        return f"{torch.cuda.get_device_name(job.device)} ({precision})"
    return f"the CPU ({precision}, {torch.get_num_threads()} threads)"
