"""How far a graph of each precision may stray from the certified float32 one, and why."""

from srdeploy.export.comparison import TOLERANCE
from srdeploy.precision import Precision
from srdeploy.validation import Settings


class Limits(Settings):
    """What a precision is allowed; all shares in 0..1."""

    agreement: float
    """Least share of equal labels over all images of the usual size together."""
    least: float
    """Least share of equal labels in any one batch, at any size. Far below the usual size a photo
    has few pixels, and a network that never saw things so small is unsure of them: what this
    limit finds is a graph that is broken at one size."""
    logits: float | None
    """Largest difference of a logit, as a share of the largest; None: recorded, not judged, since
    labels are what is deployed."""
    miou_loss: float
    """How much lower mIoU against true masks may be, where masks are given; two standard errors
    beyond it fail."""
    rounding: float
    """Relative error that a layer's rounding alone gives, about; a layer that adds several times
    as much is named."""
    reason: str
    """Where the figures come from."""


LIMITS: dict[Precision, Limits] = {
    "fp32": Limits(
        agreement=1.0,
        least=1.0,
        logits=TOLERANCE,
        miou_loss=1e-4,
        rounding=1e-5,
        reason=(
            "as parity: another order of summation moves logits by parts of a million; labels may "
            "differ where the two best classes are nearly tied, and such pixels are not counted"
        ),
    ),
    "tf32": Limits(
        agreement=0.995,
        least=0.98,
        logits=None,
        miou_loss=0.001,
        rounding=1e-3,
        reason="operands are rounded to 10 bits of mantissa, as in fp16",
    ),
    "fp16": Limits(
        agreement=0.995,
        least=0.98,
        logits=None,
        miou_loss=0.001,
        rounding=1e-3,
        reason=(
            "10 bits of mantissa: trained networks agree on 99.9 % of pixels and more; below "
            "99.5 % a layer leaves fp16's range of 6e-5 to 65504"
        ),
    ),
    "bf16": Limits(
        agreement=0.995,
        least=0.95,
        logits=None,
        miou_loss=0.001,
        rounding=8e-3,
        reason=(
            "7 bits of mantissa: trained networks agree on 99.6 % of pixels, the rest lies on "
            "borders between classes; single photos vary more"
        ),
    ),
    "int8": Limits(
        agreement=0.95,
        least=0.85,
        logits=None,
        miou_loss=0.005,
        rounding=3e-2,
        reason=(
            "256 steps for a tensor's whole range: trained networks agree on 96 to 99 % of pixels "
            "and keep their mIoU, since differences lie on borders between classes; below 95 % a "
            "layer's range is ill calibrated, or its values need more steps"
        ),
    ),
}

COMPARING_FP32 = Limits(
    agreement=0.999,
    least=0.99,
    logits=None,
    miou_loss=1e-3,
    rounding=1e-5,
    reason=(
        "the graph compares features (max-unpooling): a rounding difference moves a value now and "
        "then, and its neighbourhood with it"
    ),
)
"""For fp32 graphs where a choice inside hangs on comparing float values."""
