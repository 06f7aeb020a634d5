"""What networks return: a tensor, a dict with "out", an object with .logits, a tuple. One place
reads them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from srdeploy.errors import UserError


def main_logits(output: Any) -> Tensor:
    """The main logits float [N, K, h, w] of a network's output. Raises UserError naming what
    came instead."""
    found = output
    if isinstance(output, Mapping):
        key = next((k for k in ("out", "logits") if k in output), None)
        if key is None:
            raise UserError(
                f"the network returned a dict with keys {sorted(map(str, output))}: "
                "its logits are looked for under 'out' or 'logits'"
            )
        found = output[key]
    elif isinstance(output, tuple | list):
        found = output[0] if output else None
    elif hasattr(output, "logits"):
        found = output.logits
    if not isinstance(found, Tensor) or found.dim() != 4:
        shape = f" of shape {tuple(found.shape)}" if isinstance(found, Tensor) else ""
        raise UserError(
            f"the network returned {type(found).__name__}{shape}: logits [N, K, H, W] are needed "
            "(a tensor, a dict with 'out' or 'logits', an object with .logits, or a tuple that "
            "starts with them)"
        )
    return found


def resize_logits(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits [N, K, h, w] at `size` (H, W), bilinear with half-pixel centres; unchanged where
    they fit."""
    if logits.shape[-2:] == torch.Size(size):
        return logits
    return functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)
