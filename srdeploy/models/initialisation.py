"""Weights before training: one rule for every network here."""

from torch import nn


def initialise(module: nn.Module) -> None:
    """Kaiming-normal convolutions (fan out, for ReLU) without offset; BatchNorm starts as the identity.

    Source: He et al., "Delving Deep into Rectifiers", ICCV 2015; torchvision uses the same for its backbones.
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
    """Small weights for the convolution that gives the logits: all classes start about equally likely."""
    nn.init.normal_(convolution.weight, std=0.01)
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)
