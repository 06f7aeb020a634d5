"""How a network is read before training: the form of its output in words, its heads, its taps."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from srdeploy.errors import UserError
from srdeploy.models import make_network
from srdeploy.studies.network_report import describe_output, read_network
from srdeploy.train.regulation_config import RegulationConfig

pytestmark = pytest.mark.wheel

LOGITS = torch.zeros(2, 3, 8, 12)


@dataclass
class Answer:
    logits: Tensor


class WithHeads(nn.Module):
    """Gives a dict at a quarter of the size; one head that runs, one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU())
        self.late = nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU())
        self.head = nn.Conv2d(8, 3, 1)
        self.aux = nn.Conv2d(4, 3, 1)
        self.idle = nn.Conv2d(8, 3, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        early = self.early(images)
        return {"out": self.head(self.late(early)), "aux": self.aux(early)}


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (LOGITS, "a tensor of logits"),
        (
            {"out": LOGITS, "aux": LOGITS + 1},
            "a dict with 'out' and 'aux'; the logits are its 'out'",
        ),
        (OrderedDict(out=LOGITS), "a OrderedDict with 'out'"),
        ((LOGITS, LOGITS + 1), "a tuple of 2, of which the first part holds the logits"),
        (Answer(LOGITS), "a Answer; the logits are its .logits"),
    ],
    ids=["tensor", "dict", "one key", "tuple", "object"],
)
def test_the_form_of_an_output_is_told_in_words(output: Any, words: str) -> None:
    assert describe_output(output) == words


def test_a_reading_tells_output_taps_and_heads_and_changes_nothing() -> None:
    torch.manual_seed(0)
    network = WithHeads().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = read_network(network, 3, size=(32, 48))
    assert (found.kind, found.size) == ("WithHeads", (32, 48))
    assert (found.output.classes, found.output.grid) == (3, (8, 12))
    assert found.choice.source == "traced"
    assert [one.stride for one in found.choice.maps] == [2, 4]
    assert found.auxiliary_heads == {"aux": 0.4}
    assert found.own_parameters == {"aux": 15}
    assert [(head.name, head.runs) for head in found.auxiliary] == [("aux", True), ("idle", False)]
    assert network.training
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(module._forward_hooks for module in network.modules())


def test_a_baseline_is_read_as_if_it_had_exits() -> None:
    network = make_network("unet", 3, width=4)
    found = read_network(network, 3, settings=RegulationConfig(enabled=False))
    assert found.choice.names == tuple(f"encoder.{index}" for index in range(5))


def test_another_number_of_classes_is_refused() -> None:
    with pytest.raises(UserError, match="3"):
        read_network(WithHeads(), 5)
