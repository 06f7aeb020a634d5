"""The guard against losses that stop being finite: it names the term, the step and the photos."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from srdeploy.errors import UserError
from srdeploy.models.imported import is_imported
from srdeploy.train.compiled import refusal
from srdeploy.train.config import TrainConfig
from srdeploy.train.device import refused
from srdeploy.train.loader import Samples

NEVER = torch.iinfo(torch.int64).max
"""The value of a term's first bad step while there is none."""
NORM = "norm of the gradient"
"""Name of the gradient's norm among the loss terms."""
SHOWN = 4
"""Photos that are named; the rest are counted."""


class DivergenceGuard:
    """Looks at every step's terms: on the CPU at once, elsewhere by a flag on the device, which
    `check` reads."""

    def __init__(self, config: TrainConfig, samples: Samples) -> None:
        self._config = config
        self._samples = samples
        # First bad step of each term, int64 [terms], by the names of the terms: those of feedback
        # come in later.
        self._first: dict[tuple[str, ...], Tensor] = {}

    def look(self, terms: Mapping[str, Tensor], step: int) -> None:
        """Before the optimizer takes step number `step` (from 1). terms: scalars, by name.

        Raises UserError on the CPU; elsewhere nothing waits for the device.
        """
        values = torch.stack([term.detach().float() for term in terms.values()])
        bad = ~torch.isfinite(values)
        if values.device.type == "cpu":
            if bool(bad.any()):
                found = dict(zip(terms, values.tolist(), strict=True))
                name = cause([n for n, value in found.items() if not math.isfinite(value)])
                raise self._error(name, str(found[name]), step)
            return
        self.flag(tuple(terms), bad, step)

    def flag(self, names: tuple[str, ...], bad: Tensor, step: int) -> None:
        """Notes on the device which terms went bad (bool [terms]) at `step`, where none had
        before."""
        if names not in self._first:
            self._first[names] = torch.full((len(names),), NEVER, device=bad.device)
        first = self._first[names]
        first.masked_fill_(bad & (first == NEVER), step)

    def check(self) -> None:
        """Raises UserError naming the first step that went bad; waits for the device."""
        found = [
            (step, name)
            for names, first in self._first.items()
            for name, step in zip(names, first.tolist(), strict=True)
            if step != NEVER
        ]
        if found:
            step = min(step for step, _ in found)
            name = cause([name for at, name in found if at == step])
            raise self._error(name, "not finite", step)

    def _error(self, name: str, value: str, step: int) -> UserError:
        config = self._config
        what = f"the {name}" if name == NORM else f"the loss term '{name}'"
        return UserError(
            f"step {step}: {what} is {value}: lower --lr (it is {config.lr:g}), raise warm_up or "
            f"set clip (it is {config.clip}), then start again with --force; --resume only repeats "
            f"it; the batch was {self._photos(step)}"
        )

    def _photos(self, step: int) -> str:
        """The photos of step number `step`, from their positions."""
        count = self._config.batch * self._config.accumulate
        positions = range((step - 1) * count, (step - 1) * count + min(count, SHOWN))
        items = self._samples.dataset.items
        names = [items[self._samples.index(position)].name for position in positions]
        more = f" and {count - SHOWN} more" if count > SHOWN else ""
        return ", ".join(names) + more


def cause(names: list[str]) -> str:
    """The first of the terms that went bad in one step: the cause precedes its effects."""
    return next((name for name in names if name not in ("total", NORM)), names[0])


# Failures of a training step, explained in one line


def explain_failure(
    error: RuntimeError, config: TrainConfig, device: torch.device
) -> UserError | None:
    """The error for people; None where it is a fault of ours."""
    if isinstance(error, torch.OutOfMemoryError):
        height, width = config.crop
        return UserError(
            f"out of memory on {device} with batch {config.batch} of {height}x{width}: lower "
            "--batch and raise accumulate by the same factor, or use a smaller --crop"
        )
    if config.deterministic and (found := refused(error)) is not None:
        return found
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return refusal(error)
    name = config.network.name
    if not is_imported(name):
        return None
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(
        f"network '{name}': a step of training failed ({reason}): see that its "
        "loss.backward() works in training mode at this --batch and --crop"
    )
