"""Why a step of training failed, where it is nothing that we can mend: in one line for people."""

import torch

from srdeploy.errors import UserError
from srdeploy.models.imported import is_imported
from srdeploy.train.compiled import refusal
from srdeploy.train.config import TrainConfig
from srdeploy.train.determinism import refused


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
