"""Deterministic algorithms: only while training, and refusals in one line."""

import pytest
import torch

from srdeploy.errors import UserError
from srdeploy.train.device import deterministic


def test_deterministic_algorithms_are_taken_inside_the_block_alone() -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic


def test_an_operation_without_such_an_algorithm_is_refused_by_its_name() -> None:
    values = torch.zeros(4)
    with (
        pytest.raises(UserError, match=r"no deterministic algorithm for put_"),
        deterministic(True),
    ):
        values.put_(torch.tensor([1, 1]), torch.tensor([1.0, 2.0]))
    assert not torch.are_deterministic_algorithms_enabled()


def test_other_errors_pass_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), deterministic(True):
        torch.zeros(2, 3) @ torch.zeros(2, 3)
