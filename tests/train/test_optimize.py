"""The optimizer's groups, and micro-batches against one big batch."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from srdeploy.train.config import TrainConfig
from srdeploy.train.loader import Batch
from srdeploy.train.optimize import (
    StepModel,
    accumulate_gradient,
    make_optimizer,
    set_learning_rate,
    shares,
)
from srdeploy.train.regulation import SelfRegulation
from srdeploy.train.regulation_config import RegulationConfig

pytestmark = pytest.mark.wheel


class Plain(nn.Module):
    """A network without batch statistics, in double precision."""

    stages = ("backbone",)

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.head(self.backbone(images))
        return found


class Scale(nn.Module):
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W]."""

    def forward(self, images: Tensor) -> Tensor:
        return images.permute(0, 3, 1, 2).float() / 255


def make(weights: Tensor | None = None, enabled: bool = False) -> SelfRegulation:
    torch.manual_seed(0)
    settings = RegulationConfig(enabled=enabled)
    return SelfRegulation(Plain(), classes=3, settings=settings, class_weights=weights).train()


def random_batch(count: int, unsure: bool = False) -> Batch:
    """The first image has few valid pixels, the others many; with `unsure`, of a confidence that
    falls from image to image."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 32, 40, 3), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 3, (count, 32, 40), generator=generator, dtype=torch.uint8)
    labels[0, 2:] = 255
    if not unsure:
        return Batch(images, labels, 0)
    sure = torch.randint(0, 256, labels.shape, generator=generator)
    sure = sure // torch.arange(1, count + 1)[:, None, None]
    return Batch(images, labels, 0, None, sure.to(torch.uint8))


def split(batch: Batch, size: int) -> list[Batch]:
    return [
        Batch(
            batch.images[i : i + size],
            batch.labels[i : i + size],
            i,
            confidence=None if batch.confidence is None else batch.confidence[i : i + size],
        )
        for i in range(0, len(batch.images), size)
    ]


def gradients(regulated: SelfRegulation, group: list[Batch]) -> dict[str, Tensor]:
    weights = shares(group, 255, regulated.class_weights)
    terms = accumulate_gradient(StepModel(regulated, Scale()), group, weights, 1.0)
    found = {name: p.grad for name, p in regulated.network.named_parameters() if p.grad is not None}
    return {**found, **terms}


@pytest.mark.parametrize("class_weights", [None, [0.5, 2.0, 7.0]])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("unsure", [False, True])
def test_micro_batches_give_the_gradient_and_losses_of_the_big_batch(
    class_weights: list[float] | None, size: int, unsure: bool
) -> None:
    weights = None if class_weights is None else torch.tensor(class_weights)
    batch = random_batch(6, unsure)
    big = gradients(make(weights), [batch])
    parts = gradients(make(weights), split(batch, size))
    assert big.keys() == parts.keys()
    for name in big:
        torch.testing.assert_close(parts[name], big[name], rtol=1e-4, atol=1e-6)


def test_micro_batches_without_valid_pixels_weigh_alike() -> None:
    batch = random_batch(2)
    batch.labels[:] = 255
    assert shares(split(batch, 1), 255, None) == [0.5, 0.5]


def test_certain_micro_batches_weigh_as_those_without_confidence() -> None:
    batch = random_batch(3)
    certain = replace(batch, confidence=torch.full_like(batch.labels, 255))
    for weights in (None, torch.tensor([0.5, 2.0, 7.0])):
        expected = shares(split(batch, 1), 255, weights)
        assert shares(split(certain, 1), 255, weights) == expected
        # One of several processes: what it has counts for as much beside batches without.
        assert shares([*split(certain, 1)[:1], *split(batch, 1)[1:]], 255, weights) == expected


def test_micro_batches_weigh_by_the_sum_of_their_confidence() -> None:
    batch = random_batch(2, unsure=True)
    assert batch.confidence is not None
    sums = [
        float(sure[labels != 255].long().sum())
        for sure, labels in zip(batch.confidence, batch.labels, strict=True)
    ]
    found = shares(split(batch, 1), 255, None)
    assert found == pytest.approx([one / sum(sums) for one in sums])
    batch.confidence[:] = 0
    assert shares(split(batch, 1), 255, None) == [0.5, 0.5]


def test_pretrained_backbones_learn_slower_than_what_starts_from_scratch() -> None:
    config = TrainConfig(data=Path("d"), lr=0.01, pretrained="imagenet", head_lr_factor=10)
    regulated = make(enabled=True)
    optimizer = make_optimizer(regulated, config)
    set_learning_rate(optimizer, 0.005)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in regulated.named_parameters():
        expected = 0.005 if name.startswith("network.backbone.") else 0.05
        assert rates[id(parameter)] == pytest.approx(expected), name


def test_from_scratch_everything_learns_alike() -> None:
    optimizer = make_optimizer(make(enabled=True), TrainConfig(data=Path("d")))
    assert {group["factor"] for group in optimizer.param_groups} == {1.0}


def test_every_parameter_is_in_one_group_and_only_matrices_decay() -> None:
    regulated = make(enabled=True)
    optimizer = make_optimizer(regulated, TrainConfig(data=Path("d"), weight_decay=0.1))
    seen = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(seen) == len({id(p) for p in seen}) == len(list(regulated.parameters()))
    for group in optimizer.param_groups:
        assert {p.dim() > 1 for p in group["params"]} == {group["weight_decay"] > 0}
