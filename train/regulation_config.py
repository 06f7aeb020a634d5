"""The `regulation` section of a training configuration."""

from typing import Literal, Self

from pydantic import Field, model_validator

from srdeploy.validation import Settings


class RegulationConfig(Settings):
    """How a network is regulated in training. The deployed network is the same for every choice.

    The loss is

        main + seg_weight * seg + cls_weight * cls
             + strength * (srf_weight * srf + srl_weight * srl)

    where `main` is the network's own cross-entropy, `seg` and `cls` are the exits' losses against
    ground truth, `srf` and `srl` are the feedback between exits, and `strength` grows from 0 to 1
    over training (`srdeploy.train.schedule.ramp`). `main` always weighs 1, so that the baseline is
    the same run with everything else at 0.
    """

    enabled: bool = True
    """False trains the baseline: no exits, only the network's own loss."""
    taps: Literal["auto"] | tuple[str, ...] = "auto"
    """Names of the modules that exits read, shallow to deep; "auto": the network's `stages`, else
    the levels of its encoder, found by tracing a forward (`srdeploy.train.encoder`)."""
    exits: Literal["lean", "authors"] = "lean"
    """"lean": pooled to `min_stride` and `width` channels wide, about 1 % of DeepLab-v2's work.
    "authors": two 3x3 convolutions to 256 channels at the tap's size, as the authors' demo has."""
    width: int = Field(default=64, ge=1)
    """Channels inside a lean exit."""
    min_stride: int = Field(default=8, ge=1)
    """Lean exits average finer taps down to at least this stride (input pixels per cell)."""
    seg_weight: float = Field(default=0.4, ge=0, allow_inf_nan=False)
    """Weight of the exits' pixel cross-entropy, summed over exits other than the network's own."""
    cls_weight: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    """Weight of the multi-label image classification loss, summed over all exits."""
    srf_weight: float = Field(default=0.2, ge=0, allow_inf_nan=False)
    """Weight of SR-F, the shallowest exit teaching the deeper ones. With srf_where "everywhere"
    keep it below ground truth's weight: a hard teacher that weighs more wins over the labels
    wherever it errs."""
    srl_weight: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    """Weight of SR-L, the deepest classifier teaching the shallower ones."""
    srf_form: Literal["hard", "soft", "feature"] = "soft"
    """What SR-F compares: the teacher's labels, its class probabilities, or its hidden maps."""
    srf_where: Literal["everywhere", "right"] = "right"
    """Where SR-F follows its teacher: everywhere, or where the teacher's label is that of ground
    truth, so that it never argues with the labels. srf_form "feature" compares no classes, and so
    follows it everywhere."""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Divides the logits of SR-F (soft, feature) and SR-L; above 1 teachers are softer."""
    labels: Literal["nearest", "proportion"] = "nearest"
    """Exits' labels at their own resolution: the label at each cell's centre, or each cell's class
    proportions, in which small objects never vanish."""
    start: float = Field(default=0.25, ge=0, le=1)
    """Share of training after which feedback (SR-F, SR-L) begins."""
    ramp: float = Field(default=0.1, ge=0, le=1)
    """Share of training over which feedback grows linearly to its full weight."""

    @model_validator(mode="after")
    def _teachers_are_taught(self) -> Self:
        if self.srf_weight > 0 and self.seg_weight == 0:
            raise ValueError(
                "srf_weight needs seg_weight > 0: SR-F's teacher learns from ground truth"
            )
        if self.srl_weight > 0 and self.cls_weight == 0:
            raise ValueError(
                "srl_weight needs cls_weight > 0: SR-L's teacher learns from ground truth"
            )
        return self

    @model_validator(mode="after")
    def _taps_named_once(self) -> Self:
        if self.taps != "auto":
            if not self.taps:
                raise ValueError("taps is empty: name modules, use 'auto', or set enabled to false")
            if len(set(self.taps)) != len(self.taps):
                raise ValueError(f"taps must differ from each other, not {', '.join(self.taps)}")
        return self

    @classmethod
    def authors(cls) -> Self:
        """The published demo code's heads, hard teacher, stepped schedule and weights.

        The demo weighs classification 0.2, segmentation 0.8 (its deepest exit too) and both
        feedbacks 1.0; divided by 0.8 here, since the network's own loss always weighs 1.
        """
        return cls(
            exits="authors",
            srf_form="hard",
            srf_where="everywhere",
            seg_weight=1.0,
            cls_weight=0.25,
            srf_weight=1.25,
            srl_weight=1.25,
            start=0.25,
            ramp=0.0,
        )


def ramp(progress: float, start: float, length: float) -> float:
    """Strength of the feedback, 0..1: 0 up to `start`, then linear, 1 from `start + length` on.

    All three are shares of the whole training, 0..1. With `length` 0 it steps from 0 to 1 at
    `start`. An exit teaches others only after it has learnt from ground truth: the paper's authors
    switch feedback on after a quarter of training (README of their code); the ramp avoids the jump.
    """
    if length <= 0:
        return 1.0 if progress >= start else 0.0
    return min(1.0, max(0.0, (progress - start) / length))
