"""Recipes: configurations that come with the package, each of a network's part and a data set's.

A recipe is named NETWORK/DATA. Its text is that of recipes/common.yaml, networks/NETWORK.yaml and
data/DATA.yaml, one below the other: no key stands in two of them, so the text is one YAML file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from srdeploy.errors import UserError
from srdeploy.files import read_text
from srdeploy.runs import NetworkConfig
from srdeploy.spec import IMAGENET_MEAN, IMAGENET_STD, Mean, Std
from srdeploy.train.regulation_config import RegulationConfig
from srdeploy.validation import Settings, closest, parse_size, validated

COMMON = "common.yaml"
NETWORKS = "networks"
DATA = "data"
_END = ".yaml"


@dataclass(frozen=True)
class Recipe:
    """A configuration but for the data's folder."""

    name: str
    """NETWORK/DATA."""
    text: str
    """YAML with its comments: can be saved, changed, and given to train as --config."""

    @property
    def values(self) -> dict[str, Any]:
        """The keys that the recipe sets, as a configuration file's."""
        import yaml

        values: dict[str, Any] = yaml.safe_load(self.text)
        return values


def recipe_parts(kind: str) -> dict[str, str]:
    """Names of all parts of a kind, NETWORKS or DATA, each with the line that says what it is."""
    return {name: _text(kind, name + _END).partition("\n")[0].lstrip("# ") for name in _names(kind)}


def recipe_names() -> list[str]:
    """All recipes: every network with every data set."""
    return [f"{network}/{data}" for network in _names(NETWORKS) for data in _names(DATA)]


def open_recipe(name: str) -> Recipe:
    """The recipe NETWORK/DATA. Raises UserError naming the closest one where there is none."""
    network, slash, data = name.partition("/")
    known = {NETWORKS: _names(NETWORKS), DATA: _names(DATA)}
    example = f"{known[NETWORKS][0]}/{known[DATA][0]}"
    if not slash:
        raise UserError(
            f"recipe '{name}': a recipe is NETWORK/DATA, such as {example}; "
            "all of them: srdeploy recipes"
        )
    for kind, part in ((NETWORKS, network), (DATA, data)):
        if part not in known[kind]:
            what = "network" if kind == NETWORKS else "data set"
            raise UserError(
                f"no recipe '{name}': its {what} '{part}' is unknown: {closest(part, known[kind])}"
            )
    parts = (_text(COMMON), _text(NETWORKS, network + _END), _text(DATA, data + _END))
    return Recipe(f"{network}/{data}", "\n".join(parts))


def _names(kind: str) -> list[str]:
    """The names of all parts of a kind, sorted; reads no file."""
    files_of_kind = (one.name for one in (_folder() / kind).iterdir())
    return sorted(name.removesuffix(_END) for name in files_of_kind if name.endswith(_END))


def _folder() -> Traversable:
    return files("srdeploy.train") / "recipes"


def _text(*path: str) -> str:
    return _folder().joinpath(*path).read_text(encoding="utf-8")


# The configuration of a training run: one frozen model, made of defaults, a YAML file, flags and
# --set.

Positive = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]

FREE_ON_RESUME = frozenset({"data", "device", "workers", "cache_mib"})
"""Keys that may change when a run is resumed: none of them changes which numbers are computed."""


class TrainConfig(Settings):
    """Everything that decides how a run goes. With regulation.enabled the only difference, two runs
    see the same batches and start from the same network."""

    model_config = ConfigDict(allow_inf_nan=False)

    data: Path
    """Root folder of the data set."""
    layout: Literal["auto", "folder", "voc", "cityscapes"] = "auto"
    """How the data set's files are laid out."""
    train_split: str = "train"
    """Split to train on, or several joined by '+', as "train+extra"; the same photo in two of them
    is an error. val_split takes them too."""
    val_split: str = "val"
    network: NetworkConfig = NetworkConfig()
    """The plain network: name, options such as {"output_stride": 8}, and whether its auxiliary
    heads are trained along ("keep") or removed first ("strip")."""
    pretrained: str | None = None
    """Weights to start from: a file with the backbone's or the whole network's, or "imagenet"
    (torchvision's backbones, downloaded once); null: from scratch."""
    pretrained_missing: tuple[str, ...] = ()
    """Prefixes of backbone keys that the file may lack, e.g. ["layer4"]; they keep their random
    start."""
    regulation: RegulationConfig = RegulationConfig()
    """Self-regulation; regulation.enabled=false is the baseline."""
    longest_side: int | None = Field(default=None, ge=32)
    """Photos are scaled so that their longest side is this, here and wherever the network is
    deployed."""
    multiple: int = Field(default=1, ge=1, le=1024)
    """The network takes only heights and widths divisible by this: photos are padded, here and
    wherever it is deployed; crops must be divisible."""
    smallest: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (32, 32)
    """(height, width) from which on the network takes images, in pixels; "64x64" is read too."""
    fixed_size: bool = False
    """The network takes only images of the crop's size: photos are resized to it, whatever their
    proportions, here and wherever it is deployed."""
    mean: tuple[Mean, Mean, Mean] = IMAGENET_MEAN
    """Subtracted per channel (RGB, of values in 0..1): as pretrained weights were trained with."""
    std: tuple[Std, Std, Std] = IMAGENET_STD
    """Divided by per channel (RGB, of values in 0..1)."""
    colour_order: Literal["RGB", "BGR"] = "RGB"
    """Order in which the network gets the channels; BGR for weights that came from Caffe."""
    steps: Positive = 2000
    """Optimizer steps."""
    batch: Positive = 8
    """Images per forward pass, over all processes that train together."""
    accumulate: Positive = 1
    """Forward passes per step; the step's gradient is that of batch x accumulate images."""
    crop: tuple[Annotated[int, Field(ge=32)], Annotated[int, Field(ge=32)]] = (320, 320)
    """(height, width) of the training crops in pixels; "320x320" is read too."""
    scale: tuple[PositiveFloat, PositiveFloat] = (0.5, 2.0)
    """Photos are scaled by a factor drawn evenly from this range."""
    flip: Share = 0.5
    """Share of the photos that are mirrored left to right."""
    colour: Share = 0.25
    """Brightness, contrast and saturation are each multiplied by 1 - colour to 1 + colour."""
    augment_on: Literal["threads", "device"] = "threads"
    """Where photos are mirrored and their colours varied: by the threads that read them, or on the
    training device, where those can't keep up with it. Equal to one level of 255."""
    lr: float = Field(default=0.01, gt=0)
    """Learning rate of SGD at its highest, after the warm-up."""
    head_lr_factor: float = Field(default=10.0, gt=0)
    """With `pretrained`: times lr for everything outside the backbone, which starts from
    scratch."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    """Of weights of two or more dimensions; not of biases and normalisation parameters."""
    power: float = Field(default=0.9, ge=0)
    """Of the decay: lr * (1 - step / steps) ** power."""
    warm_up: int = Field(default=20, ge=0)
    """Steps over which the learning rate first grows linearly."""
    class_weights: Literal["none", "median-frequency"] = "none"
    """Weights of the classes in the cross-entropies."""
    confidence: bool = False
    """Weigh each pixel by the confidence that the data set's confidence/ gives its mask, as pseudo
    masks have: in the cross-entropies against ground truth, and in SR-F. Validation never does."""
    amp: bool | None = None
    """bfloat16 autocast in training; null: on CUDA only. Validation is always float32."""
    clip: float | None = Field(default=None, gt=0)
    """Largest norm of a step's gradient, of network and exits together: longer ones are shortened
    to it, and the norms stand in metrics.jsonl; null: off."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay per step of a moving average of network and exits, e.g. 0.999: what is validated and
    saved as the run's network is then the average; null: off."""
    deterministic: bool = False
    """On a GPU too every run gives the same bits: only deterministic algorithms, an operation that
    has none is refused by name. Slower. On the CPU runs always do."""
    compile: bool = False
    """Train through torch.compile, which needs a C++ compiler, and on a GPU Triton: the first step
    takes longer, the others less. Numbers differ by rounding."""
    sync_batch_norm: bool = False
    """BatchNorm's statistics over the images of all processes (only on GPUs); false: each
    process's own."""
    channels_last: bool = False
    """Lay activations out as N, H, W, C in memory."""
    log_every: Positive = 20
    """Steps between records of the losses."""
    val_every: Positive = 200
    """Steps between validations; the last step is always validated."""
    save_every: Positive | None = None
    """Steps between checkpoints; null: as val_every."""
    val_limit: Positive | None = None
    """Validate on the first so many photos; null: on all."""
    seed: int = Field(default=0, ge=0)
    device: str = "auto"
    """cpu, cuda or cuda:N; auto: cuda where there is one, and the run says which."""
    workers: int = Field(default=2, ge=0)
    """Threads that read and augment photos; 0: the training thread does it. Batches are the
    same."""
    cache_mib: int = Field(default=2048, ge=0)
    """Decoded photos kept in memory, MiB; what does not fit is decoded anew each time."""

    @field_validator("crop", "smallest", mode="before")
    @classmethod
    def _size_from_text(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return value, value
        if isinstance(value, str):
            try:
                return parse_size(value, "size")
            except UserError as error:
                raise ValueError("a crop is HEIGHTxWIDTH in pixels, such as 320x480") from error
        return value

    @model_validator(mode="after")
    def _scale_in_order(self) -> "TrainConfig":
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale is (smallest, largest), not {self.scale}")
        return self

    @model_validator(mode="after")
    def _sizes_that_the_network_takes(self) -> "TrainConfig":
        if any(side % self.multiple for side in self.crop):
            height, width = self.crop
            raise ValueError(
                f"the crop {height}x{width} is not divisible by multiple={self.multiple}: "
                "give another --crop"
            )
        if self.fixed_size and self.longest_side is not None:
            raise ValueError("fixed_size and longest_side exclude each other: keep one")
        return self

    @property
    def checkpoint_interval(self) -> int:
        """Steps between two writes of state.pt."""
        return self.save_every or self.val_every

    def autocast(self, kind: str) -> bool:
        """Whether training on this kind of device ("cpu", "cuda") computes in bfloat16 where it
        may."""
        return self.amp if self.amp is not None else kind == "cuda"

    def to_yaml(self) -> str:
        """Every key with its value, in the order documented here."""
        import yaml

        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))


def load_config(
    base: Mapping[str, Any] | None = None,
    file: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    settings: Sequence[str] = (),
    recipe: str | None = None,
    content: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """Defaults, then `base` (a resumed run's own configuration), `recipe` (by its name), `file`,
    `flags`, `settings`.

    flags maps dotted keys to values, settings are "key=value" with the value read as YAML; content
    is what counts of the file where that is not all.
    Raises UserError naming the source, the key and the closest known one.
    """
    layers: list[tuple[str, dict[str, Any]]] = []
    if base is not None:
        layers.append(("the run's configuration", dict(base)))
    if recipe is not None:
        layers.append((f"recipe {recipe}", open_recipe(recipe).values))
    if file is not None:
        whole = read_config_file(file) if content is None else dict(content)
        layers.append((str(file), whole))
    for key, value in (flags or {}).items():
        layers.append((f"--{key.rsplit('.', 1)[-1].replace('_', '-')}", nested(key, value)))
    layers += [(f"--set {setting}", parse_setting(setting)) for setting in settings]
    merged: dict[str, Any] = {}
    for _, layer in layers:
        merged = merge(merged, layer)
    try:
        return validated(TrainConfig, merged, "the configuration")
    except UserError:
        _blame(layers)
        raise


def _blame(layers: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Raises the error of the first layer that breaks the configuration, under that layer's name.

    Layers are judged in order, and only after the whole was refused: a value that is wrong until a
    later layer corrects another one is fine.
    """
    # The data folder may come in a later layer; any path serves for now.
    merged: dict[str, Any] = {"data": Path()}
    for where, layer in layers:
        merged = merge(merged, layer)
        validated(TrainConfig, merged, where)


def read_config_file(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError where it is absent or holds anything else."""
    import yaml

    try:
        value = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        # The problem and its line; YAML's own text spreads over several lines.
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{path}: not valid YAML ({line}{problem})") from error
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UserError(f"{path}: a configuration is a YAML mapping of names to values")
    return value


def parse_setting(text: str) -> dict[str, Any]:
    """'regulation.srf=0.1' as {"regulation": {"srf": 0.1}}. Raises UserError where it isn't
    KEY=VALUE."""
    import yaml

    key, equals, value = text.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise UserError(f"--set {text}: needs KEY=VALUE, such as --set regulation.srf=0.1")
    try:
        return nested(key, yaml.safe_load(value))
    except yaml.YAMLError as error:
        raise UserError(f"--set {text}: the value is not valid YAML") from error


def nested(key: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} for the key 'a.b'."""
    for part in reversed(key.split(".")):
        value = {part.strip(): value}
    assert isinstance(value, dict)
    return value


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` with the values of `above`, section by section."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def check_resumable(saved: TrainConfig, wanted: TrainConfig, folder: Path) -> None:
    """Raises UserError naming the first key in which `wanted` would make another run of
    `folder`."""
    ours, theirs = flat(wanted.model_dump(mode="json")), flat(saved.model_dump(mode="json"))
    for key in {**theirs, **ours}:
        if key.split(".")[0] in FREE_ON_RESUME or ours.get(key) == theirs.get(key):
            continue
        raise UserError(
            f"{folder} was started with {key}={theirs.get(key)}, not {ours.get(key)}: a resumed "
            f"run goes on as it began (only {', '.join(sorted(FREE_ON_RESUME))} may change); "
            "give another --out instead"
        )


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result
