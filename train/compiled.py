"""torch.compile for training: the network with its taps in one graph, and the exits in another.

The modules themselves stay as they are: validation, pictures and saved weights know nothing of it.
"""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from srdeploy.errors import UserError
from srdeploy.outputs import main_logits
from srdeploy.train.exits import ExitOutput

if TYPE_CHECKING:
    from srdeploy.train.regulation import SelfRegulation


class Compiled:
    """The compiled network and exits that `SelfRegulation` runs in training."""

    def __init__(self, regulated: "SelfRegulation") -> None:
        """Compiles at the first call, for one size of images."""
        self._network = network = regulated.network
        self._kept: dict[str, Any] = {}
        # A compiled graph holds the hooks that it saw. So these stay, unlike those of `collected`,
        # which are new ones each time.
        self._hooks = [
            network.get_submodule(name).register_forward_hook(partial(_keep, self._kept, name))
            for name in (*regulated.taps, *regulated.auxiliary_heads)
        ]
        self._run_network = torch.compile(self._collect, dynamic=False)
        self._run_exits = None
        if regulated.exits is not None:
            self._run_exits = torch.compile(regulated.exits.forward, dynamic=False)
        self._begun: set[str] = set()

    def network(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Images [N, 3, H, W] -> main logits, and the outputs of taps and own exits as they ran."""
        with self._quiet_at_first("network"):
            return self._run_network(images)

    def exits(self, maps: list[Tensor]) -> list[ExitOutput]:
        """Maps the features to the exits' outputs, as `Exits` does."""
        assert self._run_exits is not None
        with self._quiet_at_first("exits"):
            return self._run_exits(maps)

    def _collect(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        logits = main_logits(self._network(images))
        outputs = dict(self._kept)
        self._kept.clear()
        return logits, outputs

    def _quiet_at_first(self, part: str) -> AbstractContextManager[None]:
        """Compiling remarks on torch's own insides; later warnings are the network's."""
        first = part not in self._begun
        self._begun.add(part)
        return without_comments() if first else nullcontext()

    def close(self) -> None:
        """Takes the hooks off the network."""
        for hook in self._hooks:
            hook.remove()


def _keep(kept: dict[str, Any], name: str, module: nn.Module, _args: Any, output: Any) -> None:
    # In validation nobody asks for them.
    if module.training:
        kept.pop(name, None)  # a later output stands at its own place in the order
        kept[name] = output


@contextmanager
def compiled(regulated: "SelfRegulation", wanted: bool = True) -> Iterator[None]:
    """While the block runs, `regulated` trains through torch.compile; as it is where that is not
    `wanted`."""
    if not wanted:
        yield
        return
    regulated.compiled = Compiled(regulated)
    try:
        yield
    finally:
        regulated.compiled.close()
        regulated.compiled = None


@contextmanager
def without_comments() -> Iterator[None]:
    """Silences what torch's own compiler remarks about torch: nothing that a user could change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def require_compiler(device: torch.device, processes: int) -> None:
    """Compiles a sum on `device`. Raises UserError where this machine can't (no C++ compiler, no
    Triton), and where several processes train together, which nobody has tried with it."""
    if processes > 1:
        raise UserError("compile is for one process: leave it away under torchrun")
    try:
        with without_comments():
            torch.compile(_add_one)(torch.ones(2, device=device))
    except Exception as error:  # each backend has its own
        raise refusal(error) from error


def refusal(error: BaseException) -> UserError:
    """The error of torch.compile, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    return UserError(
        f"compile=true: torch.compile fails here ({reason}): install a C++ compiler (on a GPU "
        "Triton too), or train with --set compile=false"
    )


def _add_one(values: Tensor) -> Tensor:
    return values + 1
