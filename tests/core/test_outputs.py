"""The main logits of whatever a network returns."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from srdeploy.errors import UserError
from srdeploy.outputs import main_logits

LOGITS = torch.zeros(2, 5, 8, 12)
OTHER = torch.zeros(2, 7, 4, 6)


@dataclass
class Output:
    logits: Tensor
    loss: Tensor | None = None


@dataclass
class Prediction:
    seg: Tensor
    presence: Tensor


Pair = namedtuple("Pair", "features logits")
Nameless = namedtuple("Nameless", "main auxiliary")


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        {"out": LOGITS, "aux": OTHER},
        OrderedDict(logits=LOGITS, hidden=OTHER),
        {"pred": LOGITS, "loss": torch.zeros(())},
        {"out": None, "logits": LOGITS},
        {"logits": [LOGITS, OTHER]},
        Output(LOGITS),
        SimpleNamespace(logits=LOGITS, auxiliary=OTHER),
        Prediction(LOGITS, torch.zeros(2, 5)),
        Pair(OTHER, LOGITS),
        Nameless(LOGITS, OTHER),
        (LOGITS, OTHER),
        [LOGITS],
        ({"out": LOGITS}, OTHER),
    ],
    ids=lambda output: type(output).__name__,
)
def test_the_main_logits_are_found_in_every_usual_form(output: Any) -> None:
    assert main_logits(output) is LOGITS


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            {"a": LOGITS, "b": OTHER},
            r"returned dict with a: Tensor of shape \(2, 5, 8, 12\), b: Tensor of shape \(2, 7, 4",
        ),
        # Queries and their classes (Mask2Former): one 4-D tensor, but no logits per pixel.
        ({"masks": LOGITS, "classes": torch.zeros(2, 100, 5)}, "returned dict with masks"),
        (Prediction(torch.zeros(2), torch.zeros(2, 5)), "returned Prediction with seg: Tensor"),
        ({}, "returned dict with no fields"),
        ((), "returned tuple: logits"),
        (torch.zeros(2, 5), r"returned Tensor of shape \(2, 5\): logits \[N, K, H, W\]"),
        (None, "returned NoneType"),
        ({"out": torch.zeros(3)}, r"returned Tensor of shape \(3,\)"),
    ],
)
def test_anything_else_is_refused_naming_what_came(output: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        main_logits(output)
