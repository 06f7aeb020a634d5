"""Shared construction of the networks: initial weights, and the check of a width."""

from torch import nn

from srdeploy.errors import UserError


def initialise(module: nn.Module) -> None:
    """Kaiming-normal convolutions (fan out, for ReLU) with zero bias; BatchNorm is the identity.

    Source: He et al., "Delving Deep into Rectifiers", ICCV 2015; torchvision uses the same for its
    backbones.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.BatchNorm2d):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)


def initialise_logits(convolution: nn.Conv2d) -> None:
    """Small weights for the convolution that gives the logits: classes start equally likely."""
    nn.init.normal_(convolution.weight, std=0.01)
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)


def check_width(width: object, option: str = "width") -> None:
    """Raises UserError where `width`, the value of a network's `option`, is no channel count."""
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise UserError(
            f"{option} is {width!r}: a whole number of channels from 1 is needed, e.g. 64"
        )
