"""How pseudo masks are made of a classifier's maps: one frozen model, kept beside them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from srdeploy.errors import UserError
from srdeploy.train.config import (
    FREE_ON_RESUME,
    TrainConfig,
    flat,
    load_config,
    merge,
    parse_setting,
    read_config_file,
)
from srdeploy.train.run_folder import saved_config
from srdeploy.validation import Settings, validated

Scale = Annotated[float, Field(gt=0, le=8)]
Dilation = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


class PseudoConfig(Settings):
    """Everything that decides what becomes of the classifier's maps. Sizes are in pixels of the
    photo as the network sees it."""

    scales: tuple[Scale, ...] = Field(default=(0.5, 1.0, 1.5, 2.0), min_length=1)
    """Sizes, relative to the photo's, at which the network looks; their maps are averaged."""
    flip: bool = True
    """Look at the mirrored photo too."""
    grid: int = Field(default=4, ge=1)
    """Pixels per cell of the maps that are kept, along each side."""
    refine: Literal["pamr", "walk", "none"] = "pamr"
    """What makes maps follow the photo's edges: "pamr", pixel-adaptive refinement; "walk", a random
    walk; "none"."""
    pamr_steps: int = Field(default=10, ge=1)
    pamr_dilations: tuple[Dilation, ...] = Field(default=(1, 2, 4, 8, 12, 24), min_length=1)
    """Distances of the 8 neighbours that a pixel is mixed with."""
    walk_grid: int = Field(default=8, ge=1)
    """Pixels per cell that is walked on, along each side."""
    walk_radius: int = Field(default=5, ge=1)
    """Cells that a step of the walk may go, along each axis."""
    walk_power: float = Field(default=30.0, gt=0)
    """Sharpens the affinities: higher, and the walk stays within one colour."""
    walk_steps: int = Field(default=4, ge=1)
    """Few: colours by themselves don't hold a longer walk back, as the boundaries that IRN learns
    do for its 256 steps at power 10."""
    background: float = Field(default=0.25, gt=0, lt=1)
    """The background's score. A class's map has 1 as its highest, so a pixel is background where no
    class reaches this. Not used with a teacher, whose maps have the background's own."""
    certain: Share = 0.2
    """Pixels less certain than this are ignored. Certainty is how far the best score a stands above
    the second best b, (a - b) / (a + b)."""
    batch: int = Field(default=8, ge=1)
    """Photos of one size that are looked at together."""


# The configuration of a folder of pseudo masks

HOME = "pseudo"
"""Folder, beside photos and masks, of what they were made with."""
CONFIG = "config.yaml"
MAPS = "maps"
SCORES = "scores"
REPORT = "report.json"
SECTION = "pseudo"
"""Keys of PseudoConfig are given as pseudo.KEY, all others are the classifier's."""
UNUSED = (
    *("ema", "compile", "class_weights", "sync_batch_norm", "val_limit", "accumulate"),
    "confidence",
)
"""Keys of a training configuration that the classifier's training does not read."""
_NOT_FOR_NUMBERS = FREE_ON_RESUME | {
    *("train_split", "val_split", "log_every", "val_every", "save_every"),
    *UNUSED,
}


class PseudoRun(Settings):
    """Everything that decides what a folder of pseudo masks holds."""

    classifier: TrainConfig
    """Data, network and training of the classifier of tags; with a teacher its data, splits and
    only sizes."""
    pseudo: PseudoConfig = PseudoConfig()
    """The settings from maps to masks."""
    labels_from_masks: bool = False
    """Tags are what each mask shows, instead of what labels.csv says: to measure what the lack of
    masks costs."""
    teacher: Path | None = None
    """A run whose network gives the maps, instead of a classifier of tags."""

    def to_yaml(self) -> str:
        """Every key with its value."""
        import yaml

        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))

    def classifier_values(self) -> dict[str, Any]:
        """The settings that decide the classifier's weights, by dotted key."""
        values = flat(self.classifier.model_dump(mode="json"))
        return {k: v for k, v in values.items() if k.split(".")[0] not in _NOT_FOR_NUMBERS}


def load_pseudo_run(
    folder: Path,
    file: Path | None,
    flags: Mapping[str, Any],
    settings: Sequence[str],
    labels_from_masks: bool | None = None,
    teacher: Path | None = None,
) -> PseudoRun:
    """The configuration of `folder` where it has one, else defaults; then `file`, `flags` and
    `settings` as `srdeploy.train.config.load_config` takes them. A section, and settings, called
    `pseudo` are PseudoConfig's. Raises UserError.
    """
    saved = saved_pseudo_run(folder)
    base: dict[str, Any] = {}
    if saved is not None:
        base = saved.model_dump(mode="json")
    elif teacher is not None:
        # Sizes and colours as the teacher saw them.
        base = {"classifier": saved_config(teacher).model_dump(mode="json")}
    content, others, sections = parted(file, settings, [SECTION])
    section = merge(base.get(SECTION, {}), sections[SECTION])
    classifier = load_config(base.get("classifier"), file, flags, others, content=content)
    given = {
        "labels_from_masks": labels_from_masks,
        "teacher": teacher,
    }
    values = {k: base[k] for k in given if k in base} | {
        k: v for k, v in given.items() if v is not None
    }
    pseudo = validated(PseudoConfig, section, f"the settings of {SECTION}")
    return validated(
        PseudoRun, {**values, "classifier": classifier, "pseudo": pseudo}, "the configuration"
    )


def parted(
    file: Path | None, settings: Sequence[str], names: Sequence[str]
) -> tuple[dict[str, Any], list[str], dict[str, dict[str, Any]]]:
    """A configuration file and --set texts without the sections `names`, and those sections, of
    which the settings come last. Raises UserError."""
    content = read_config_file(file) if file is not None else {}
    sections: dict[str, dict[str, Any]] = {}
    for name in names:
        value = content.pop(name, None) or {}
        if not isinstance(value, dict):
            raise UserError(f"{file}: '{name}' is a section of keys and values, not {value!r}")
        sections[name] = value
    rest = []
    for one in settings:
        name = one.partition(".")[0]
        if name in sections and "=" in one:
            sections[name] = merge(sections[name], parse_setting(one)[name])
        else:
            rest.append(one)
    return content, rest, sections


def saved_pseudo_run(folder: Path) -> PseudoRun | None:
    """The settings of the folder's masks; None where it holds none. Raises UserError."""
    path = folder / HOME / CONFIG
    if not path.exists():
        return None
    return validated(PseudoRun, read_config_file(path), str(path))


def require_ours(folder: Path) -> None:
    """Raises UserError where pseudo masks can't be written to `folder`."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: pseudo masks need a folder")
    if folder.exists() and any(folder.iterdir()) and not (folder / HOME / CONFIG).exists():
        raise UserError(
            f"{folder} exists and holds no pseudo masks of ours: give another --out, or remove it"
        )


def require_same_classifier(saved: PseudoRun, wanted: PseudoRun, folder: Path) -> None:
    """Raises UserError naming the first key in which `wanted` would train another classifier."""
    ours, theirs = wanted.classifier_values(), saved.classifier_values()
    for key in {**theirs, **ours}:
        if ours.get(key) != theirs.get(key):
            raise UserError(
                f"the classifier in {folder} is trained with {key}={theirs.get(key)}, not "
                f"{ours.get(key)}: --force trains it anew, or give another --out"
            )
    raise UserError(
        f"the classifier in {folder} is trained on other photos or tags than the data set has now: "
        "--force trains it anew, or give another --out"
    )
