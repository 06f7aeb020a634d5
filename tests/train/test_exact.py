"""The moving average, clipping and the guard: what they compute, and what they say."""

from pathlib import Path

import pytest
import torch
from torch import nn

from srdeploy.errors import UserError
from srdeploy.runs import METRICS, STATE, NetworkConfig
from srdeploy.train.checkpoint import EMA, read_state
from srdeploy.train.config import TrainConfig
from srdeploy.train.guard import NORM, DivergenceGuard
from srdeploy.train.loop import train
from srdeploy.train.recorder import read_metrics
from srdeploy.train.start import prepare


def test_the_average_follows_its_formula_and_gives_the_weights_back_bit_for_bit() -> None:
    module = nn.BatchNorm2d(2)
    ema = EMA(module, 0.5)
    expected = module.weight.detach().clone()
    for step in range(1, 6):
        module.weight.data += step / 3
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * module.weight.detach()
    own = module.weight.detach().clone()
    with ema.in_place():
        assert torch.allclose(module.weight, expected)
    assert torch.equal(module.weight, own)


def test_the_guard_names_term_step_and_photos_at_once_and_from_its_flags(tiny_data: Path) -> None:
    config = TrainConfig(
        data=tiny_data,
        network=NetworkConfig(name="unet", options={"width": 4}),
        batch=2,
        device="cpu",
    )
    samples = prepare(config).data.samples
    photos = ", ".join(samples.dataset.items[samples.index(p)].name for p in (4, 5))
    terms = {"total": torch.tensor(float("nan")), "seg": torch.tensor(float("inf"))}
    with pytest.raises(UserError, match=f"step 3: the loss term 'seg' is inf.*{photos}"):
        DivergenceGuard(config, samples).look(terms, 3)
    guard = DivergenceGuard(config, samples)
    guard.check()
    guard.flag(("main",), torch.tensor([False]), 2)
    guard.flag(("main", NORM), torch.tensor([False, True]), 3)
    guard.flag(("main", NORM), torch.tensor([True, True]), 4)
    with pytest.raises(UserError, match=f"step 3: the {NORM} is not finite.*{photos}"):
        guard.check()


def test_clip_and_average_are_recorded_and_kept_in_checkpoints(
    tiny_data: Path, tmp_path: Path
) -> None:
    network = NetworkConfig(name="unet", options={"width": 4})
    config = TrainConfig(
        data=tiny_data, network=network, batch=2, crop=(32, 32), steps=2, val_every=1, log_every=1
    ).model_copy(update={"device": "cpu", "clip": 0.01, "ema": 0.5, "val_limit": 1})
    train(config, tmp_path / "run")
    norms = [r["gradient_norm"] for r in read_metrics(tmp_path / "run" / METRICS) if "lr" in r]
    assert len(norms) == 2
    assert min(norms) > 0
    state = read_state(tmp_path / "run" / STATE)
    kept = {k.removeprefix("network."): v for k, v in state["ema"].items() if "network." in k}
    assert kept.keys() == state["network"].keys()
    assert any(not torch.equal(kept[name], state["network"][name]) for name in kept)
