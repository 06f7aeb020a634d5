"""The optimizer, and the gradient of one step over its micro-batches."""

import math
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from srdeploy.train.config import TrainConfig
from srdeploy.train.distributed import ALONE, Parallel, World
from srdeploy.train.loader import Batch
from srdeploy.train.losses import CERTAIN
from srdeploy.train.regulation import SelfRegulation


def make_optimizer(regulated: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    """SGD over `regulated.network` and what stands beside it, its exits; each group's `factor`
    multiplies the schedule's learning rate.

    With pretrained weights everything outside the backbone learns head_lr_factor times as fast, as
    in DeepLab; a network without a `backbone` was loaded whole, and only its exits do. Vectors
    (biases, normalisation) are not decayed: shrinking them regularises nothing.
    """
    fresh = config.head_lr_factor if config.pretrained is not None else 1.0
    has_backbone = isinstance(
        getattr(regulated.get_submodule("network"), "backbone", None), nn.Module
    )
    groups: defaultdict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in regulated.named_parameters():
        kept = name.startswith("network.backbone.") if has_backbone else name.startswith("network.")
        decay = config.weight_decay if parameter.dim() > 1 else 0.0
        if parameter.requires_grad:
            groups[1.0 if kept else fresh, decay].append(parameter)
    return torch.optim.SGD(
        [
            {"params": parameters, "weight_decay": decay, "factor": factor}
            for (factor, decay), parameters in groups.items()
        ],
        lr=config.lr,
        momentum=config.momentum,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets every group's rate to `rate` times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of step 0 .. steps - 1: linear warm-up times poly decay, Chen et al., DeepLab (TPAMI
    2018)."""
    warm = min(1.0, (step + 1) / (config.warm_up + 1))
    decay = math.pow(1 - step / config.steps, config.power)
    return config.lr * warm * decay


def shares(
    group: Sequence[Batch], ignore_index: int, weights: Tensor | None, world: World = ALONE
) -> list[float]:
    """What each micro-batch weighs in its step, so that their losses add up to the big batch's
    mean, over all processes.

    A pixel loss is a mean over valid pixels, each with its class's weight and its confidence;
    micro-batches have unequal sums of those. The sum is exact for the network's own loss, and for
    the others where these are equal. weights: float32 [K], on the CPU.
    """
    if len(group) * world.size == 1:
        return [1.0]
    totals = []
    for batch in group:
        counts = _counts(batch)
        counts[ignore_index] = 0
        if weights is not None:
            counts[: len(weights)] *= weights.double()
        totals.append(float(counts.sum()))
    whole = sum(sum(row) for row in world.gather(totals))
    return [total / whole if whole else 1 / (len(group) * world.size) for total in totals]


def _counts(batch: Batch) -> Tensor:
    """Pixels of each label, each counting as much as its confidence, float64 [256]."""
    labels = batch.labels.flatten().long()
    if batch.confidence is None:
        return torch.bincount(labels, minlength=256).double()
    sure = batch.confidence.flatten().double()
    return torch.bincount(labels, sure, minlength=256) / CERTAIN


@dataclass(frozen=True)
class StepModel:
    """The objects that take a run's steps: the same for all steps."""

    regulated: SelfRegulation
    normalise: nn.Module
    """uint8 images of a batch -> what the network sees."""
    amp: bool = False
    """True if forward passes run in bfloat16 autocast."""
    channels_last: bool = False
    parallel: Parallel | None = None
    """Set where several processes train."""


def accumulate_gradient(
    model: StepModel, group: Sequence[Batch], weights: Sequence[float], progress: float
) -> dict[str, Tensor]:
    """Adds the gradient of a step's micro-batches; returns the loss terms, and their "total",
    detached.

    weights: from `shares`. progress: share of the training that is done, 0..1. Of several processes
    the gradient is that of all, and the terms are this one's part.
    """
    parallel = model.parallel
    device = next(model.regulated.network.parameters()).device
    layout = torch.channels_last if model.channels_last else torch.contiguous_format
    sums: dict[str, Tensor] = {}
    for number, (batch, weight) in enumerate(zip(group, weights, strict=True), start=1):
        here = batch.to(device)
        images = model.normalise(here.images).contiguous(memory_format=layout)
        with nullcontext() if parallel is None else parallel.micro_batch(number == len(group)):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=model.amp):
                losses = (parallel or model.regulated).losses(
                    images, here.labels, progress, here.confidence
                )
            # The processes' gradients are averaged, but the weights are made for a sum.
            scale = weight if parallel is None else weight * parallel.world.size
            torch.autograd.backward(losses.total * scale)
        for name, term in {"total": losses.total.detach(), **losses.terms}.items():
            sums[name] = sums[name] + weight * term if name in sums else weight * term
    return sums
