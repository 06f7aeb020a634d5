"""The compute capabilities that TensorRT for RTX builds for."""

from collections.abc import Sequence
from typing import Any

from srdeploy.errors import UserError
from srdeploy.precision import Precision

RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
_WITHOUT_TF32 = ("7.5",)
"""Older than the units for tf32 and bf16."""


def require_target(capability: str, precision: Precision) -> None:
    """Raises ValueError where TensorRT for RTX does not build for it, or not in that precision."""
    if capability not in RTX_CAPABILITIES:
        raise ValueError(
            f"compute capability {capability} is no target of TensorRT for RTX, which builds for "
            + ", ".join(RTX_CAPABILITIES)
        )
    if capability in _WITHOUT_TF32 and precision in ("tf32", "bf16"):
        raise ValueError(
            f"compute capability {capability}: such GPUs do not compute in {precision}"
        )


def set_targets(trt: Any, config: Any, targets: Sequence[str]) -> None:
    """Makes `config` build for them. Raises UserError where this version can't."""
    config.num_compute_capabilities = len(targets)
    known = trt.ComputeCapability.__members__
    for index, target in enumerate(targets):
        member = known.get(f"SM{target.replace('.', '')}")
        if member is None or not config.set_compute_capability(member, index):
            raise UserError(
                f"TensorRT for RTX {trt.__version__} can't build for compute capability {target}: "
                "install a newer tensorrt-rtx"
            )
