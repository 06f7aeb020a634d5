"""The variants of training that evidence compares: flags of `srdeploy train`, and nothing else."""

from srdeploy.errors import UserError
from srdeploy.train.regulation_config import RegulationConfig
from srdeploy.validation import closest

BASELINE = "baseline"


def regulated(**settings: object) -> list[str]:
    """Flags for self-regulation at its defaults but for `settings`, keys of `regulation`."""
    words = ["--sr"]
    for key, value in settings.items():
        words += ["--set", f"regulation.{key}={value}"]
    return words


VARIANTS: dict[str, list[str]] = {
    BASELINE: ["--no-sr"],
    "mea": regulated(srf_weight=0, srl_weight=0),
    "srf": regulated(srl_weight=0),
    "srl": regulated(srf_weight=0),
    "all": regulated(),
    # What SR-F compares, soft by default, and whether also where the teacher is wrong.
    "hard": regulated(srf_form="hard"),
    "feature": regulated(srf_form="feature"),
    "everywhere": regulated(srf_where="everywhere"),
    "srf-everywhere": regulated(srf_where="everywhere", srl_weight=0),
    "hard-everywhere": regulated(srf_form="hard", srf_where="everywhere"),
    # All weights of exits and feedback, and the authors' loss at lean exits.
    "half": regulated(seg_weight=0.2, cls_weight=0.05, srf_weight=0.1, srl_weight=0.05),
    "double": regulated(seg_weight=0.8, cls_weight=0.2, srf_weight=0.4, srl_weight=0.2),
    "authors": regulated(
        **RegulationConfig.authors().model_dump(exclude_unset=True, exclude={"exits"})
    ),
    # The default weights at the authors' heads, each of which works as much as a network: whether
    # lean exits cost accuracy.
    "authors-heads": regulated(exits="authors"),
    # When feedback comes in; after a quarter, ramped over a tenth, is the default.
    "at-once": regulated(start=0.0, ramp=0.0),
    "stepped": regulated(ramp=0.0),
    "late": regulated(start=0.5),
}
"""Flags by name. All of them start from the same weights and see the same batches."""

SETS: dict[str, list[str]] = {
    "main": [BASELINE, "mea", "srf", "srl", "all"],
    "forms": [BASELINE, "all", "hard", "feature", "everywhere", "hard-everywhere"],
    "weights": [BASELINE, "all", "half", "double", "authors"],
    "heads": [BASELINE, "all", "authors-heads"],
    "schedule": [BASELINE, "all", "at-once", "stepped", "late"],
}
"""Names that stand for several variants."""


def chosen(names: list[str]) -> list[str]:
    """The variants that `names` of variants and sets stand for, the baseline first, each once.
    Raises UserError for an unknown name."""
    found = [BASELINE]
    for name in names:
        if name not in VARIANTS and name not in SETS:
            raise UserError(f"no variant '{name}': {closest(name, [*SETS, *VARIANTS])}")
        found += SETS.get(name, [name])
    return list(dict.fromkeys(found))
