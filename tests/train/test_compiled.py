"""torch.compile in training: the same losses and gradients, and modules that know nothing of it."""

import shutil

import pytest
import torch
from torch import nn

from srdeploy.errors import UserError
from srdeploy.train.compiled import compiled, require_compiler
from srdeploy.train.regulation import SelfRegulation
from srdeploy.train.regulation_config import RegulationConfig

NEEDS_COMPILER = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="no C++ compiler here: torch.compile was NOT tested",
)


class Small(nn.Module):
    """Two stages and a head."""

    stages = ("first", "second")

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1, stride=2)
        self.last = nn.Conv2d(4, 3, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(torch.relu(self.second(torch.relu(self.first(images)))))
        return found


@NEEDS_COMPILER
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # torch's, of itself
def test_compiled_training_has_the_losses_and_gradients_of_the_plain_one() -> None:
    torch.manual_seed(0)
    settings = RegulationConfig(width=4, min_stride=2)
    regulated = SelfRegulation(Small(), classes=3, settings=settings).train()
    images, labels = torch.rand(2, 3, 32, 32), torch.randint(0, 3, (2, 32, 32))
    names = list(regulated.state_dict())
    found = []
    for wanted in (False, True):
        regulated.zero_grad()
        with compiled(regulated, wanted):
            losses = regulated.losses(images, labels)
            torch.autograd.backward(losses.total)
        gradients = {
            n: p.grad.clone() for n, p in regulated.named_parameters() if p.grad is not None
        }
        found.append((losses, gradients))
    (plain, slow), (quick, fast) = found
    assert quick.terms.keys() == plain.terms.keys()
    assert {"main", "seg", "cls", "srf", "srl"} <= quick.terms.keys()
    torch.testing.assert_close(quick.total, plain.total, rtol=1e-4, atol=1e-5)
    assert slow.keys() == fast.keys()
    for name, gradient in slow.items():
        torch.testing.assert_close(fast[name], gradient, rtol=1e-3, atol=1e-5)
    assert list(regulated.state_dict()) == names
    assert not any(module._forward_hooks for module in regulated.network.modules())


def test_several_processes_are_told_to_leave_it_away() -> None:
    with pytest.raises(UserError, match="compile is for one process"):
        require_compiler(torch.device("cpu"), processes=2)
