"""What networks return: a tensor, a dict with "out", an object with .logits, a tuple. One place
reads them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from srdeploy.errors import UserError

_KEYS = ("out", "logits")


def main_logits(output: Any) -> Tensor:
    """The main logits float [N, K, h, w] of a network's output, whatever its form.

    A tensor; a dict or an object with "out" or "logits", or with just one map [N, K, h, w]; a
    tuple or list whose first part is any of these. Raises UserError naming what came instead.
    """
    if isinstance(output, Tensor):
        if output.dim() == 4:
            return output
        raise _refused(_described(output))
    named = _fields(output)
    if named is not None:
        key = next((key for key in _KEYS if named.get(key) is not None), None)
        if key is not None:
            return main_logits(named[key])
        if isinstance(output, tuple):
            return main_logits(output[0])
        maps = [value for value in named.values() if isinstance(value, Tensor) and value.dim() > 2]
        if len(maps) == 1 and maps[0].dim() == 4:
            return maps[0]
        listed = ", ".join(f"{key}: {_described(value)}" for key, value in named.items())
        raise _refused(f"{type(output).__name__} with {listed or 'no fields'}")
    if isinstance(output, tuple | list) and output:
        return main_logits(output[0])
    raise _refused(_described(output))


def _fields(output: Any) -> dict[str, Any] | None:
    """A mapping's entries or an object's fields by name; None for what has neither."""
    if isinstance(output, Mapping):  # transformers' outputs are mappings too
        return {str(key): value for key, value in output.items()}
    if hasattr(output, "_asdict"):
        return dict(output._asdict())
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        fields = dataclasses.fields(output)
        return {field.name: getattr(output, field.name) for field in fields}
    if hasattr(output, "logits"):
        return {"logits": output.logits}
    return None


def _described(value: Any) -> str:
    """A value in a message: its type, and a tensor's shape."""
    kind = type(value).__name__
    return f"{kind} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else kind


def _refused(came: str) -> UserError:
    return UserError(
        f"the network returned {came}: logits [N, K, H, W] are needed (a tensor, a dict or an "
        "object with 'out' or 'logits' or just one such map, or a tuple that starts with them)"
    )


def resize_logits(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits [N, K, h, w] at `size` (H, W), bilinear with half-pixel centres; unchanged where
    they fit."""
    if logits.shape[-2:] == torch.Size(size):
        return logits
    return functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)
