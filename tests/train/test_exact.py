"""The moving average, clipping and the guard: what they compute, and what they say."""

from pathlib import Path

import pytest
import torch
from torch import nn

from srdeploy.errors import UserError
from srdeploy.train.average import Average
from srdeploy.train.config import TrainConfig
from srdeploy.train.guard import NORM, Guard
from srdeploy.train.start import prepare


def test_the_average_follows_its_formula_and_gives_the_weights_back_bit_for_bit() -> None:
    module = nn.BatchNorm2d(2)
    average = Average(module, 0.5)
    expected = module.weight.detach().clone()
    for step in range(1, 6):
        module.weight.data += step / 3
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * module.weight.detach()
    own = module.weight.detach().clone()
    with average.in_place():
        assert torch.allclose(module.weight, expected)
    assert torch.equal(module.weight, own)


def test_the_guard_names_term_step_and_photos_at_once_and_from_its_flags(tiny_data: Path) -> None:
    config = TrainConfig(
        data=tiny_data, network={"name": "unet", "options": {"width": 4}}, batch=2, device="cpu"
    )
    samples = prepare(config).samples
    photos = ", ".join(samples.dataset.items[samples.index(p)].name for p in (4, 5))
    terms = {"total": torch.tensor(float("nan")), "seg": torch.tensor(float("inf"))}
    with pytest.raises(UserError, match=f"step 3: the loss term 'seg' is inf.*{photos}"):
        Guard(config, samples).look(terms, 3)
    guard = Guard(config, samples)
    guard.check()
    guard.flag(("main",), torch.tensor([False]), 2)
    guard.flag(("main", NORM), torch.tensor([False, True]), 3)
    guard.flag(("main", NORM), torch.tensor([True, True]), 4)
    with pytest.raises(UserError, match=f"step 3: the {NORM} is not finite.*{photos}"):
        guard.check()
