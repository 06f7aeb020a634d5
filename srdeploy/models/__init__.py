"""The plain networks, by name: what is trained, exported and served. They know nothing of exits.

Every network maps images float32 [N, 3, H, W] to logits float32 [N, K, H, W] for any H, W >= 32,
and has `stages` (names of its feature stages for get_submodule, shallow to deep; its own logits are
one more, last exit) and `auxiliary_heads` (names of sub-modules that give logits of their own and
are supervised in training, with their loss weight).
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from srdeploy.errors import UserError
from srdeploy.models.deeplab import (
    deeplabv2_mobilenetv2,
    deeplabv2_resnet18,
    deeplabv2_resnet50,
    deeplabv2_resnet101,
)
from srdeploy.models.hourglass import StackedHourglass
from srdeploy.models.hrnet import hrnet_w18, hrnet_w32, hrnet_w48
from srdeploy.models.imported import imported_network, is_imported
from srdeploy.models.ocrnet import ocrnet_hrnet_w18, ocrnet_hrnet_w48, ocrnet_resnet101
from srdeploy.models.segnet import SegNet
from srdeploy.models.spgnet import SPGNet
from srdeploy.models.unet import UNet
from srdeploy.validation import closest

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "deeplabv2-resnet18": deeplabv2_resnet18,
    "deeplabv2-resnet50": deeplabv2_resnet50,
    "deeplabv2-resnet101": deeplabv2_resnet101,
    "deeplabv2-mobilenetv2": deeplabv2_mobilenetv2,
    "segnet": SegNet,
    "unet": UNet,
    "hrnet-w18": hrnet_w18,
    "hrnet-w32": hrnet_w32,
    "hrnet-w48": hrnet_w48,
    "ocrnet-hrnet-w18": ocrnet_hrnet_w18,
    "ocrnet-hrnet-w48": ocrnet_hrnet_w48,
    "ocrnet-resnet101": ocrnet_resnet101,
    "spgnet-resnet50": SPGNet,
    "hourglass": StackedHourglass,
}
"""Builders: classes (K) and keyword options -> the network, its weights from torch's global RNG."""

INTERPRETATIONS = frozenset({"spgnet-resnet50"})
"""Networks whose authors left widths or details open, so that ours are a reading of the paper."""


def make_network(name: str, /, classes: int, **options: Any) -> nn.Module:
    """Builds the network `name` for `classes` classes, with fresh weights, in training mode.

    name: one of NETWORKS, or "package.module:function" for a user's own, whose code is imported
    and run (see srdeploy.models.imported). Raises UserError for an unknown name or option, naming
    the closest one, and for a value that does not fit.
    """
    builder = NETWORKS.get(name)
    if builder is None and not is_imported(name):
        raise UserError(
            f"unknown network '{name}': {closest(name, NETWORKS)} "
            "(your own: PACKAGE.MODULE:FUNCTION)"
        )
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 2:
        raise UserError(
            f"network '{name}': classes is {classes!r}: a whole number from 2 is needed"
        )
    if builder is None:
        return imported_network(name, classes, options).train()
    known = [
        parameter.name
        for parameter in inspect.signature(builder).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    for option in options:
        if option not in known:
            raise UserError(f"network '{name}' has no option '{option}': {closest(option, known)}")
    return builder(classes, **options)
