"""How far a converted graph, or an engine, lies from the reference, and how both are run."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import floor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto

from srdeploy.artifacts.artifact import Artifact
from srdeploy.export.comparison import Outputs, PrecisionLimits, expose_logits, overlap, unexplained
from srdeploy.export.precision.half import emulate
from srdeploy.imaging import Pixels, restore
from srdeploy.metrics import Counts, Score
from srdeploy.precision import Precision
from srdeploy.runtimes.base import Runtime
from srdeploy.runtimes.registry import has_precisions, open_runtime
from srdeploy.spec import Spec
from srdeploy.validation import Settings

USUAL = "usual"
"""The name that batches gives to single photos of the usual size."""


class BatchDifference(Settings):
    """One batch at one size, run in one way."""

    size: str
    """smallest, usual or largest, and whether it was cut to what a CPU can do."""
    shape: tuple[int, int, int]
    """(N, H, W)."""
    computed_by: str
    agreement: float
    """Share of pixels with equal labels."""
    counted: float
    """The share that is judged: for fp32, pixels whose two best classes are nearly tied count as
    equal; else `agreement`."""
    least: float
    """Least share allowed in one batch."""
    largest_logit: float | None
    largest_difference: float | None
    """Difference of logits; None where the candidate gives only labels, or NaN or infinity."""
    allowed_difference: float | None
    """In the logits' own units; None: recorded, not judged."""
    finite: bool | None
    """Whether neither side's logits hold NaN or infinity; None where there are only labels."""

    @property
    def passed(self) -> bool:
        far = (
            self.largest_difference is not None
            and self.allowed_difference is not None
            and self.largest_difference > self.allowed_difference
        )
        return self.finite is not False and not far and self.counted >= self.least

    @property
    def relative_difference(self) -> float | None:
        """The largest difference as a share of the largest logit."""
        if self.largest_difference is None or not self.largest_logit:
            return None
        return self.largest_difference / self.largest_logit


@dataclass(frozen=True)
class Pair:
    """One photo at the usual size, and both sides' labels."""

    photo: Pixels
    """uint8 [H, W, 3]."""
    reference: Pixels
    """uint8 [H, W]."""
    candidate: Pixels
    """uint8 [H, W]."""

    @property
    def agreement(self) -> float:
        return float((self.reference == self.candidate).mean())


@dataclass(frozen=True)
class MaskScores:
    """mIoU of both graphs against true masks, at the usual size, restored to the masks' size."""

    reference: float
    candidate: float
    per_class: dict[str, tuple[float | None, float | None]]
    """IoU of the reference and of the candidate, by the scored classes' names."""
    error: float | None
    """Standard error of the loss, by leaving each photo out in turn: a few photos hold few pixels
    of a rare class, whose IoU then jumps. None for one photo."""

    @property
    def gain(self) -> float:
        """How much higher the candidate's mIoU is."""
        return self.candidate - self.reference

    def exceeds(self, allowed: float) -> bool | None:
        """Whether more is lost than allowed, by two standard errors; None where the photos are too
        few to say."""
        if -self.gain <= allowed:
            return False
        certain = self.error is not None and -self.gain - 2 * self.error > allowed
        return True if certain else None


class Difference:
    """Collects the batches that were run in one way."""

    def __init__(
        self, computed_by: str, spec: Spec, limits: PrecisionLimits, ties_count: bool
    ) -> None:
        self.computed_by = computed_by
        self.spec = spec
        self.limits = limits
        self.cases: list[BatchDifference] = []
        self.pairs: list[Pair] = []
        self.worst: list[Pixels] = []
        """Of each case, the photo of its batch that differs most."""
        self._ties_count = ties_count
        self._counts = np.zeros((2, spec.class_count), np.int64)
        self._usual = np.zeros(3, np.int64)  # pixels, those that agree, those that count as equal
        self._scores = Score(spec), Score(spec)
        self._confusions: list[tuple[Counts, Counts]] = []  # after each photo, so far

    def add(
        self,
        size: str,
        images: Pixels,
        expected: Outputs,
        labels: Pixels,
        logits: npt.NDArray[np.float32] | None,
        target: Pixels | None,
    ) -> None:
        """One batch: the reference's labels and logits, the candidate's, and, for a single photo,
        its true mask uint8 [H, W] of any size."""
        equal = expected[0] == labels
        ties = self._ties_count and np.isfinite(expected[1]).all()
        counted = ~unexplained(expected, labels) if ties else equal
        case = self._case(size, expected, logits, equal, counted)
        self.cases.append(case)
        self.worst.append(images[int(counted.mean((1, 2)).argmin())])
        if size != USUAL:
            return
        self._usual += np.array([equal.size, equal.sum(), counted.sum()])
        self._counts += overlap(expected[0], labels, self.spec.class_count)
        self.pairs.append(Pair(images[0], expected[0][0], labels[0]))
        if target is not None:
            for score, one in zip(self._scores, (expected[0], labels), strict=True):
                score.update(target, restore(one[0], *target.shape))
            left, right = (score.confusion.copy() for score in self._scores)
            self._confusions.append((left, right))

    @property
    def agreement(self) -> float:
        """Share of equal labels over all images of the usual size."""
        return float(self._usual[1] / self._usual[0])

    @property
    def counted(self) -> float:
        """The share that is judged, as of a case."""
        return float(self._usual[2] / self._usual[0])

    @property
    def finite(self) -> bool | None:
        """None where only labels were compared."""
        known = [case.finite for case in self.cases if case.finite is not None]
        return all(known) if known else None

    @property
    def against_masks(self) -> MaskScores | None:
        """None where no masks were given."""
        if not self._scores[0].images:
            return None
        left, right = (score.result() for score in self._scores)
        return MaskScores(
            left.miou,
            right.miou,
            {name: (left.iou[name], right.iou[name]) for name in left.iou},
            self._loss_error(),
        )

    def _loss_error(self) -> float | None:
        """The jackknife's standard error of mIoU lost."""
        count = len(self._confusions)
        if count < 2:
            return None
        scored = list(self.spec.scored_ids)
        empty = np.zeros_like(self._scores[0].confusion)
        before = [(empty, empty), *self._confusions[:-1]]
        without = [
            _miou(self._scores[0].confusion - (now[0] - then[0]), scored)
            - _miou(self._scores[1].confusion - (now[1] - then[1]), scored)
            for then, now in zip(before, self._confusions, strict=True)
        ]
        return float(np.sqrt((count - 1) * np.var(without)))

    @property
    def iou(self) -> dict[str, float | None]:
        """IoU of the two predictions per class, at the usual size; None for absent classes."""
        both, either = self._counts.tolist()
        return {
            name: both[k] / either[k] if either[k] else None
            for k, name in enumerate(self.spec.classes)
        }

    @property
    def relative_difference(self) -> float | None:
        """The largest difference of logits, as a share of the largest logit."""
        known = [c.relative_difference for c in self.cases if c.relative_difference is not None]
        return max(known, default=None)

    @property
    def least(self) -> float:
        """The judged share in the worst batch."""
        return min(case.counted for case in self.cases)

    @property
    def passed(self) -> bool:
        scores = self.against_masks
        kept = scores is None or not scores.exceeds(self.limits.miou_loss)
        enough = self.counted >= self.limits.agreement
        return all(case.passed for case in self.cases) and enough and kept

    def telling_photo(self) -> Pixels:
        """uint8 [H, W, 3]: of the cases that failed, else of those that differ, at the smallest
        size; NaN before other faults."""
        order = [
            (
                case.finite is not False,
                case.passed,
                case.counted == 1,
                case.shape[1] * case.shape[2],
            )
            for case in self.cases
        ]
        return self.worst[min(range(len(order)), key=order.__getitem__)]

    def figures(self) -> dict[str, Any]:
        """The figures as JSON values."""
        iou = self.iou
        scores = self.against_masks
        present = [value for value in iou.values() if value is not None]
        figures: dict[str, Any] = {
            "computed_by": self.computed_by,
            "passed": self.passed,
            "agreement": self.agreement,
            "agreement_that_would_have_passed": self.counted,
            "least_agreement_that_would_have_passed": self.least,
            "tolerance_that_would_have_passed": self.relative_difference,
            "finite": self.finite,
            "iou_of_the_two_predictions": iou,
            "largest_iou_difference": 1 - min(present, default=1.0),
        }
        if scores is not None:
            figures["against_masks"] = {
                "miou_reference": scores.reference,
                "miou_candidate": scores.candidate,
                "miou_difference": scores.gain,
                "standard_error": scores.error,
                "iou_per_class": {name: list(pair) for name, pair in scores.per_class.items()},
                "largest_iou_difference": max(
                    abs(a - b) for a, b in _known(list(scores.per_class.values()))
                ),
            }
        return figures | {"cases": [case.model_dump(mode="json") for case in self.cases]}

    def _case(
        self,
        size: str,
        expected: Outputs,
        logits: npt.NDArray[np.float32] | None,
        equal: npt.NDArray[np.bool_],
        counted: npt.NDArray[np.bool_],
    ) -> BatchDifference:
        finite, scale, difference, allowed = None, None, None, None
        if logits is not None:
            finite = bool(np.isfinite(expected[1]).all() and np.isfinite(logits).all())
        if logits is not None and finite:
            scale = float(np.abs(expected[1]).max())
            difference = float(np.abs(expected[1] - logits).max())
            allowed = None if self.limits.logits is None else self.limits.logits * scale
        return BatchDifference(
            size=size,
            shape=(equal.shape[0], equal.shape[1], equal.shape[2]),
            computed_by=self.computed_by,
            agreement=float(equal.mean()),
            counted=float(counted.mean()),
            least=self.limits.least,
            largest_logit=scale,
            largest_difference=difference,
            allowed_difference=allowed,
            finite=finite,
        )


def _known(pairs: Sequence[tuple[float | None, float | None]]) -> list[tuple[float, float]]:
    """A class that only one side has counts as IoU 0 on the other."""
    return [(a or 0.0, b or 0.0) for a, b in pairs]


def share_text(share: float) -> str:
    """In percent, rounded down: 99.996 % must not read as all."""
    return f"{floor(share * 1e4 + 1e-9) / 100:.2f} %"


def part_text(part: float) -> str:
    """A small part of a whole, in percent with two digits."""
    return f"{100 * part:.2g} %"


def _miou(confusion: Counts, scored: Sequence[int]) -> float:
    """Mean IoU of the scored classes that are there or predicted."""
    correct = confusion.diagonal()[scored]
    union = (confusion.sum(0) + confusion.sum(1))[scored] - correct
    there = union > 0
    return float((correct[there] / union[there]).mean()) if there.any() else 0.0


# Runs of the candidate

EMULATED = "rounding emulated in float32 by onnxruntime"
"""How 16-bit graphs are computed besides running the file: every 16-bit tensor is rounded. On CPUs
onnxruntime keeps float32 between fp16 nodes, which would hide overflow, and it has no bf16."""

HALVES = ("fp16", "bf16")
UNTYPED = ("fp32", "tf32")
"""Their graph is the float32 one."""


@dataclass(frozen=True)
class Candidate:
    """One way of running a graph, open."""

    computed_by: str
    labels: Runtime | None
    """What gives labels; None: they are taken from the logits."""
    logits: Runtime | None
    """What gives logits; None: only labels can be had."""

    def run(self, images: Pixels) -> tuple[Pixels, npt.NDArray[np.float32] | None]:
        """images uint8 [N, H, W, 3] -> labels uint8 [N, H, W], logits float32 [N, K, H, W]."""
        logits = None if self.logits is None else self.logits.logits(images)
        if self.labels is not None:
            return self.labels.run(images), logits
        assert logits is not None
        return logits.argmax(1).astype(np.uint8), logits


def open_reference(
    model: ModelProto, file: Path, spec: Spec, folder: Path, stack: ExitStack
) -> Candidate:
    """The float32 graph in onnxruntime on the CPU; a copy with its logits exposed goes to
    `folder`."""
    exposed = folder / "reference.onnx"
    onnx.save(expose_logits(model, file), str(exposed))
    return Candidate(
        "onnxruntime float32", None, stack.enter_context(open_runtime(exposed, spec=spec))
    )


def open_candidates(
    artifact: Artifact,
    model: ModelProto | None,
    spec: Spec,
    precision: Precision,
    runtime: str,
    device: str | None,
    folder: Path,
    stack: ExitStack,
) -> list[Candidate]:
    """Every way in which the candidate is judged; files needed for them go to `folder`.

    model: the candidate's graph; None for an engine. 16-bit graphs run with their rounding
    emulated and, where onnxruntime has the type (fp16), as they are. Raises UserError where a
    runtime can't be had.
    """
    device = device or ("cuda" if artifact.kind == "engine" else "cpu")
    if artifact.kind == "engine":
        engine = stack.enter_context(open_runtime(artifact.path, device, runtime, spec))
        known = artifact.signature is not None and artifact.signature.logits is not None
        return [Candidate(_name(engine), engine, engine if known else None)]
    assert model is not None
    candidates = []
    emulated = precision in HALVES and runtime in ("auto", "onnxruntime")
    if emulated:
        rounded = folder / "emulated.onnx"
        onnx.save(expose_logits(emulate(model), artifact.file), str(rounded))
        inside = stack.enter_context(open_runtime(rounded, spec=spec))
        candidates.append(Candidate(EMULATED, None, inside))
    if not (emulated and precision == "bf16"):
        exposed = folder / "candidate.onnx"
        onnx.save(expose_logits(model, artifact.file), str(exposed))
        inner = precision if has_precisions(runtime) and precision in HALVES else None
        whole, inside = (
            stack.enter_context(open_runtime(file, device, runtime, spec, precision=inner))
            for file in (artifact.path, exposed)
        )
        candidates.append(Candidate(_name(whole), whole, inside))
    return candidates


def _name(runtime: Runtime) -> str:
    return f"{runtime.backend}, {runtime.device}, {runtime.precision}"
