"""Torch against the exported file, on real images, at the sizes that the spec promises."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import ModelProto
from torch import nn

from srdeploy.deployable import Deployable, cut_logits, pad_images
from srdeploy.errors import UserError
from srdeploy.export.certificate import Line
from srdeploy.export.comparison import (
    SYNTHETIC,
    TOLERANCE,
    Outputs,
    batches,
    compares_features,
    expose_logits,
    overlap,
    unexplained,
)
from srdeploy.imaging import Pixels
from srdeploy.outputs import main_logits
from srdeploy.runtimes.base import ImageShapeError
from srdeploy.runtimes.onnx_runtime import first_line
from srdeploy.runtimes.registry import open_runtime
from srdeploy.spec import Spec
from srdeploy.validation import Settings

FROZEN = (
    "the exporter freezes what a network computes from the image's size, such as the bins of "
    "adaptive pooling: export it for one size, with --size HxW --set fixed_size=true (a run: by "
    "its network, --weights RUN/network.safetensors --classes RUN/spec.json)"
)
"""What to do about a graph that is right only at some sizes."""

_NUDGE, _NUDGES = 1e-6, 8
"""Relative size of the changes of the input that stand for rounding, and how many are tried."""


class ParityCase(Settings):
    """One batch at one size."""

    size: str
    """smallest, usual or largest, and whether it was cut to what a CPU can do."""
    shape: tuple[int, int, int]
    """(N, H, W)."""
    agreement: float
    """Share of pixels with equal labels."""
    largest_logit: float
    largest_difference: float
    """The largest difference of logits."""
    allowed_difference: float
    """The tolerance in the logits' own units, or what rounding-sized changes do to the network."""
    beyond: float
    """Share of pixels with a larger logit difference than allowed."""
    unexplained: float
    """Share of pixels whose label differs although torch's two best classes are not nearly tied."""
    allowed_unexplained: float
    """0, but for networks where only rounding-sized changes of the input change such labels."""
    finite: bool
    """Whether neither side gave NaN or infinity."""

    @property
    def passed(self) -> bool:
        return self.finite and not self.beyond and self.unexplained <= self.allowed_unexplained


def parity_line(
    network: nn.Module,
    spec: Spec,
    file: Path,
    photos: Sequence[Pixels],
    synthetic: bool = False,
    model: ModelProto | None = None,
) -> Line:
    """The line `parity`: `network` in torch against `file` in onnxruntime, on the CPU.

    photos: uint8 [H, W, 3], any sizes; they are resized to the spec's sizes. `drawn`: they are
    synthetic, which the line then says. model: what `file` holds, where it has been read.
    Passes where every value is finite, logits differ by no more than rounding explains, and
    labels differ only where the network's two best classes are nearly tied. A network that
    chooses by comparing its own features (max-unpooling) turns a rounding difference into a
    moved value now and then: there, what rounding explains is measured, by nudging torch's own
    input. Raises UserError where onnxruntime fails on a size that torch takes.
    """
    model = onnx.load(str(file)) if model is None else model
    compares = compares_features(model)
    counts = np.zeros((2, spec.class_count), np.int64)
    both = Deployable(network, spec, output="both").eval()
    cases = []
    with tempfile.TemporaryDirectory(prefix="srdeploy-") as folder:
        exposed = Path(folder) / "exposed.onnx"
        onnx.save(expose_logits(model, file), str(exposed))
        with open_runtime(file) as deployed, open_runtime(exposed) as inside:
            for size, images in batches(photos, spec.input):
                expected = _in_torch(both, images)
                try:
                    found = deployed.run(images), inside.logits(images)
                except ImageShapeError as error:
                    raise _fault(error, images, spec) from error
                nudged = _nudged(both, images, expected) if compares else (0.0, 0.0)
                cases.append(_compare(size, expected, found, nudged))
                counts += overlap(expected[0], found[0], spec.class_count)
    return Line(
        name="parity",
        passed=all(case.passed for case in cases),
        detail=_detail(cases, compares) + (SYNTHETIC if synthetic else ""),
        figures=_figures(cases, counts, spec, compares) | ({"drawn": True} if synthetic else {}),
    )


def _fault(error: ImageShapeError, images: Pixels, spec: Spec) -> UserError:
    """onnxruntime's failure on `images`, by size and node; the file is a temporary one."""
    cause = error.__cause__
    if cause is None:
        return error
    reason = first_line(cause)
    size = f"{images.shape[1]}x{images.shape[2]}"
    text = f"the exported graph fails on images of {size}, which torch takes ({reason})"
    if spec.input.fixed or "allocate" in str(cause):  # memory is not the graph's fault
        return UserError(text)
    return UserError(f"{text}; {FROZEN}")


def _in_torch(module: Deployable, images: Pixels) -> Outputs:
    with torch.inference_mode():
        labels, logits = module(torch.from_numpy(images))
    return labels.numpy(), logits.numpy()


def _nudged(module: Deployable, images: Pixels, expected: Outputs) -> tuple[float, float]:
    """What changes of the input by a few units in the last place do to the network itself.

    Returns the largest logit difference and the largest share of labels that change without a tie.
    """
    generator = torch.Generator().manual_seed(0)
    difference, moved = 0.0, 0.0
    with torch.inference_mode():
        values = module.normalise(torch.from_numpy(images))
        for _ in range(_NUDGES):
            noise = torch.randn(values.shape, generator=generator) * _NUDGE
            padded = pad_images(values * (1 + noise), module.multiple)
            logits = main_logits(module.network(padded))
            size = (images.shape[1], images.shape[2])
            found = cut_logits(logits, size, module.multiple).numpy()
            difference = max(difference, float(np.abs(found - expected[1]).max()))
            wrong = unexplained(expected, found.argmax(1))
            moved = max(moved, float(wrong.mean()))
    return difference, moved


def _compare(
    size: str, expected: Outputs, found: Outputs, nudged: tuple[float, float]
) -> ParityCase:
    """One batch of torch's labels and logits against the exported file's."""
    labels, logits = expected
    finite = bool(np.isfinite(logits).all() and np.isfinite(found[1]).all())
    difference = np.nan_to_num(np.abs(logits - found[1]), nan=np.inf).max(1)
    scale = float(np.abs(logits).max()) if finite else 0.0
    # Twice: each of the two sides may have been moved.
    allowed = max(TOLERANCE * scale, 2 * nudged[0]) if finite else 0.0
    return ParityCase(
        size=size,
        shape=(labels.shape[0], labels.shape[1], labels.shape[2]),
        agreement=float((labels == found[0]).mean()),
        largest_logit=scale,
        largest_difference=float(difference.max()) if finite else 0.0,
        allowed_difference=allowed,
        beyond=float((difference > allowed).mean()),
        unexplained=float(unexplained(expected, found[0]).mean()),
        allowed_unexplained=2 * nudged[1] if finite else 0.0,
        finite=finite,
    )


def _detail(cases: Sequence[ParityCase], compares: bool) -> str:
    if not all(case.finite for case in cases):
        sizes = sorted({case.size for case in cases if not case.finite})
        return f"NaN or infinity in the logits at {'; '.join(sizes)}"
    agreement = min(case.agreement for case in cases)
    share = "all pixels" if agreement == 1 else f"{agreement:.4%} of pixels or more"
    text = (
        f"labels agree on {share} in {len(cases)} batches; "
        f"tolerance that would have passed {_needed(cases):.1e}, allowed {TOLERANCE:.0e}"
    )
    if compares:
        text += " or what nudging the input does: the graph compares features"
    wrong = sorted({case.shape[1:] for case in cases if not case.passed})
    right = sorted({case.shape[1:] for case in cases} - set(wrong))
    if wrong and right:
        text += f"; right at {_sizes(right)}, wrong at {_sizes(wrong)}. Perhaps {FROZEN}"
    return text


def _sizes(sizes: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{height}x{width}" for height, width in sizes)


def _needed(cases: Sequence[ParityCase]) -> float:
    return max(
        (c.largest_difference / c.largest_logit for c in cases if c.largest_logit > 0), default=0.0
    )


def _figures(
    cases: Sequence[ParityCase],
    counts: npt.NDArray[np.int64],
    spec: Spec,
    compares: bool,
) -> dict[str, Any]:
    either = counts[1].tolist()
    overlap = {
        name: counts[0, k].item() / either[k] if either[k] else None
        for k, name in enumerate(spec.classes)
    }
    return {
        "tolerance": TOLERANCE,
        "tolerance_that_would_have_passed": _needed(cases),
        "graph_compares_features": compares,
        "iou_of_the_two_predictions": overlap,
        "cases": [case.model_dump(mode="json") for case in cases],
    }
