"""What parity and verification share: images at the promised sizes, exposed logits, label counts,
and how far each precision may lie from float32.

N batch, K classes, H height, W width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, TensorProto
from PIL import Image

from srdeploy.errors import UserError
from srdeploy.graph.index import GraphIndex
from srdeploy.graph.operators import COMPARING
from srdeploy.imaging import Pixels
from srdeploy.precision import Precision
from srdeploy.spec import InputPolicy
from srdeploy.validation import Settings

Outputs = tuple[Pixels, npt.NDArray[np.float32]]
"""Labels uint8 [N, H, W] and logits float32 [N, K, H, W]."""

TOLERANCE = 1e-4
"""Largest logit difference that rounding explains, as a share of the largest logit."""

SYNTHETIC = "; on synthetic images, not photos: give --images"
"""What the line ends with where no photos were given."""

_MOST_PIXELS = 768 * 768
"""Larger images take a CPU too long; the usual size is always measured."""


def expose_logits(model: ModelProto, file: Path) -> ModelProto:
    """A copy of a graph, with the tensor that its labels are taken from as an output named logits.

    It is float32, whatever the graph computes in. file: where `model` was read from, for messages.
    """
    exposed = ModelProto()
    exposed.CopyFrom(model)
    graph = exposed.graph
    if all(value.name != "logits" for value in graph.output):
        index = GraphIndex(graph)
        node = index.producer_of("labels")
        while node is not None and node.op_type != "ArgMax":
            node = index.producer_of(node.input[0])
        if node is None:
            raise UserError(f"{file}: its labels do not come from an ArgMax: nothing to compare")
        cast = onnx.helper.make_node("Cast", [node.input[0]], ["logits"], to=TensorProto.FLOAT)
        graph.node.append(cast)
        shape = ["N", None, "H", "W"]
        graph.output.append(onnx.helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape))
    return exposed


def batches(
    photos: Sequence[Pixels], policy: InputPolicy, most: int | None = None
) -> list[tuple[str, Pixels]]:
    """Every photo at the usual size, one at the smallest and the largest, and all in one batch; at
    the one size where there is only that.

    photos: uint8 [H, W, 3], any sizes. Returns (size's name, images uint8 [N, H, W, 3]); no batch
    has more than `most` images [any number].
    """
    usual = policy.usual
    largest, name = _affordable(policy.largest, usual)
    batch = [*photos, photos[0][:, ::-1]][:most]  # at least two, also where there is one photo
    cases = [("usual", _stack([photo], usual)) for photo in photos]
    if not policy.fixed:
        cases.append(("smallest", _stack(photos[:1], policy.smallest)))
        cases.append((name, _stack(photos[:1], largest)))
        if len(batch) > 1:
            cases.append(("smallest, batch", _stack(batch, policy.smallest)))
    if len(batch) > 1:
        cases.append(("usual, batch", _stack(batch[:2], usual)))
    return cases


def _affordable(largest: tuple[int, int], usual: tuple[int, int]) -> tuple[tuple[int, int], str]:
    pixels = max(_MOST_PIXELS, usual[0] * usual[1])
    if largest[0] * largest[1] <= pixels:
        return largest, "largest"
    shrink = (pixels / (largest[0] * largest[1])) ** 0.5
    height, width = (max(1, int(side * shrink)) for side in largest)
    return (height, width), f"largest, cut from {largest[0]}x{largest[1]}"


def _stack(photos: Sequence[Pixels], size: tuple[int, int]) -> Pixels:
    height, width = size
    resized = [
        Image.fromarray(np.ascontiguousarray(photo)).resize((width, height)) for photo in photos
    ]
    return np.stack([np.array(image) for image in resized])


def unexplained(expected: Outputs, labels: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Where labels differ from those expected although the two best classes are not nearly tied.

    bool [N, H, W].
    """
    best = np.partition(expected[1], -2, axis=1)[:, -2:]
    tied = best[:, 1] - best[:, 0] <= 2 * TOLERANCE * np.abs(expected[1]).max()
    moved: npt.NDArray[np.bool_] = (labels != expected[0]) & ~tied
    return moved


def overlap(a: Pixels, b: Pixels, classes: int) -> npt.NDArray[np.int64]:
    """Pixels per class that both have and that either has, int64 [2, K]."""
    both = np.bincount(a[a == b].ravel(), minlength=256)[:classes]
    of_a, of_b = (np.bincount(x.ravel(), minlength=256)[:classes] for x in (a, b))
    return np.stack([both, of_a + of_b - both])


def compares_features(model: ModelProto) -> bool:
    """Whether a choice inside the graph hangs on comparing float values (the final ArgMax
    aside).
    """
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in (*inferred.input, *inferred.value_info, *inferred.output)
    }
    floats = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
    for node in inferred.node:
        if node.op_type in COMPARING and types.get(node.input[0]) in floats:
            return True
        if node.op_type == "MaxPool" and len(node.output) > 1:
            return True
    return [node.op_type for node in inferred.node].count("ArgMax") > 1


class PrecisionLimits(Settings):
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
    """Relative error that only a layer's rounding gives, about; a layer that adds several times
    as much is named."""
    reason: str
    """Where the figures come from."""


LIMITS: dict[Precision, PrecisionLimits] = {
    "fp32": PrecisionLimits(
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
    "tf32": PrecisionLimits(
        agreement=0.995,
        least=0.98,
        logits=None,
        miou_loss=0.001,
        rounding=1e-3,
        reason="operands are rounded to 10 bits of mantissa, as in fp16",
    ),
    "fp16": PrecisionLimits(
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
    "bf16": PrecisionLimits(
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
    "int8": PrecisionLimits(
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

COMPARING_FP32 = PrecisionLimits(
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
