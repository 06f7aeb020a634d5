"""state.pt: everything comes back, and broken files are refused by name."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from srdeploy.data import open_dataset
from srdeploy.errors import UserError
from srdeploy.runs import STATE
from srdeploy.train.checkpoint import Progress, items_digest, load_state, read_state, save_state
from srdeploy.train.config import TrainConfig
from srdeploy.train.optimize import make_optimizer
from srdeploy.train.regulation import SelfRegulation
from srdeploy.train.regulation_config import RegulationConfig

pytestmark = pytest.mark.wheel


class Small(nn.Module):
    """Two convolutions and dropout."""

    stages = ("first",)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.dropout = nn.Dropout(0.5)
        self.last = nn.Conv2d(4, 3, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(self.dropout(torch.relu(self.first(images))))
        return found


def make(enabled: bool = True, seed: int = 0) -> tuple[SelfRegulation, torch.optim.SGD]:
    torch.manual_seed(seed)
    settings = RegulationConfig(enabled=enabled, width=4, min_stride=2)
    regulated = SelfRegulation(Small(), classes=3, settings=settings).train()
    return regulated, make_optimizer(regulated, TrainConfig(data=Path("d"), lr=0.1))


def step(regulated: SelfRegulation, optimizer: torch.optim.SGD, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    images = torch.rand(2, 3, 64, 64, generator=generator)
    labels = torch.randint(0, 3, (2, 64, 64), generator=generator)
    optimizer.zero_grad()
    torch.autograd.backward(regulated.losses(images, labels).total)
    optimizer.step()


@pytest.mark.parametrize("enabled", [True, False])
def test_going_on_from_a_checkpoint_equals_never_having_stopped(
    tmp_path: Path, enabled: bool
) -> None:
    whole, optimizer = make(enabled)
    for number in range(2):
        step(whole, optimizer, number)
    progress = Progress(step=2, best_miou=0.5, best_step=1)
    save_state(tmp_path, whole, optimizer, progress, "items")
    for number in range(2, 5):
        step(whole, optimizer, number)

    resumed, optimizer = make(enabled, seed=9)
    assert load_state(tmp_path, resumed, optimizer, "items") == progress
    for number in range(2, 5):
        step(resumed, optimizer, number)
    ours, theirs = resumed.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_state_is_refused_with_the_remedy(tmp_path: Path, kept: float) -> None:
    regulated, optimizer = make()
    save_state(tmp_path, regulated, optimizer, Progress(), "items")
    content = (tmp_path / STATE).read_bytes()
    end = int(kept * len(content)) if isinstance(kept, float) else kept
    (tmp_path / STATE).write_bytes(content[:end])
    with pytest.raises(UserError, match=r"state\.pt: truncated or not a checkpoint.*--force"):
        read_state(tmp_path / STATE)


def test_a_file_of_another_tool_is_refused(tmp_path: Path) -> None:
    torch.save({"model": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt: not a checkpoint of srdeploy"):
        read_state(tmp_path / "other.pt")
    torch.save(Path("anything that is not plain data"), tmp_path / "object.pt")
    with pytest.raises(UserError, match=r"object\.pt: truncated or not a checkpoint"):
        read_state(tmp_path / "object.pt")


def test_an_absent_state_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file or folder: .*state\.pt"):
        read_state(tmp_path / STATE)


def test_other_photos_than_at_the_start_are_refused(tmp_path: Path) -> None:
    regulated, optimizer = make()
    save_state(tmp_path, regulated, optimizer, Progress(), "items")
    with pytest.raises(UserError, match="the training split holds other photos"):
        load_state(tmp_path, regulated, optimizer, "other items")


def test_another_network_is_refused(tmp_path: Path) -> None:
    regulated, optimizer = make()
    save_state(tmp_path, regulated, optimizer, Progress(), "items")
    wider, _ = make()
    wider.network.last = nn.Conv2d(4, 5, 1)
    with pytest.raises(UserError, match=r"does not fit this network.*last\.weight"):
        load_state(tmp_path, wider, optimizer, "items")


def test_photos_are_told_apart_by_name_and_order(tiny_data: Path) -> None:
    train, val = open_dataset(tiny_data, "train"), open_dataset(tiny_data, "val")
    assert items_digest(train) == items_digest(open_dataset(tiny_data, "train"))
    assert items_digest(train) != items_digest(val)


def test_photos_may_have_names_that_are_no_utf8(tiny_data: Path) -> None:
    data = open_dataset(tiny_data, "val")
    name = os.fsdecode(b"caf\xe9")
    odd = replace(data, items=(replace(data.items[0], name=name),))
    assert items_digest(odd) != items_digest(data)


def test_a_checkpoint_of_the_first_format_is_read_and_unknown_ones_are_refused(
    tmp_path: Path,
) -> None:
    regulated, optimizer = make()
    step(regulated, optimizer, 0)
    save_state(tmp_path, regulated, optimizer, Progress(step=1), "items")
    state = read_state(tmp_path / STATE)
    del state["ema"]
    torch.save(state | {"format": 1}, tmp_path / STATE)
    other, its_optimizer = make(seed=1)
    assert load_state(tmp_path, other, its_optimizer, "items").step == 1
    for name, value in regulated.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    torch.save(state | {"format": 99}, tmp_path / STATE)
    with pytest.raises(UserError, match="format 99, but this version reads"):
        load_state(tmp_path, other, its_optimizer, "items")
