"""Settings that few people change: keys of `--set` and of configuration files, not options."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field

from srdeploy.errors import UserError
from srdeploy.files import read_text
from srdeploy.precision import Target
from srdeploy.validation import Settings, parse_options, validated

Model = TypeVar("Model", bound=Settings)


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Texts = Annotated[tuple[str, ...], BeforeValidator(_as_list)]
"""One text, or a list of them."""


class EngineSettings(Settings):
    """How TensorRT builds an engine: the keys of `srdeploy export --engine-config`."""

    profile: Texts = ()
    """Shapes MIN,OPT,MAX as NxHxW, such as 1x32x32,1x360x480,4x720x960; a list makes several
    profiles. Default: from the network's sizes."""
    sizes_of: Path | None = None
    """Folder of photos to take the profile's sizes from."""
    max_batch: int = Field(default=4, ge=1)
    """Largest batch of the profile."""
    workspace: float | None = Field(default=None, gt=0)
    """GiB of memory that the builder may try kernels with. Default: the GPU's."""
    timing_cache: Path | None = None
    """File of kernel timings, read and written; it shortens the next build."""
    refittable: bool = False
    """Let the engine take other weights without a build."""


class ExportSettings(EngineSettings):
    """All keys of `srdeploy export --set`: those of the engine, of int8 and of the input's size."""

    target: Target | None = None
    """int8: tensorrt (symmetric) or cpu (u8s8, fast on CPUs). Default: tensorrt
    with --trt, else cpu."""
    quantise_ends: bool = False
    """int8: quantise the first and last layers too."""
    calibration: Path | None = None
    """int8: folder of photos to measure ranges on. Default: the training photos of the run."""
    calibration_images: int = Field(default=64, ge=1)
    """int8: how many photos to measure ranges on."""
    multiple: int | None = Field(default=None, ge=1)
    """The network takes only multiples of this: pad in the graph."""
    fixed_size: bool = False
    """The network takes only images of --size."""


class ServerSettings(Settings):
    """How a server runs: the keys of `srdeploy serve --server-config` and `--set`. The server's own
    defaults hold for what is None."""

    sessions: int | None = Field(default=None, ge=1)
    """Sessions of each model. Measured at the start by default, as the next two are."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of each session."""
    max_batch: int | None = Field(default=None, ge=1)
    """Most images in one run; 1 turns batching off."""
    max_wait_ms: float | None = Field(default=None, ge=0)
    """How long a run waits for images that are being decoded. Default: 2."""
    max_body_mib: float | None = Field(default=None, gt=0)
    """Largest body of one request, in MiB. Default: 32."""
    max_megapixels: float | None = Field(default=None, gt=0)
    """Largest photo, read from its header before it is decoded. Default: 50."""
    max_network_megapixels: float | None = Field(default=None, gt=0)
    """Largest image as the network sees it; a model always takes its own largest size. Default:
    4.2."""
    max_images: int | None = Field(default=None, ge=1)
    """Most images in one request. Default: 16."""
    max_waiting: int | None = Field(default=None, ge=1)
    """Most requests inside at once; more get 503 and Retry-After. Default: 64."""
    max_waiting_mib: float | None = Field(default=None, gt=0)
    """Most MiB that their bodies take together. Default: 256."""
    timeout: float | None = Field(default=None, gt=0)
    """Seconds until an answer. Default: 30."""
    drain: float | None = Field(default=None, ge=0)
    """Seconds after SIGTERM in which requests are still accepted, while load balancers turn away.
    Default: 1."""

    def limits(self) -> dict[str, Any]:
        """The limits that are given, by the names of the server's model."""
        named = {
            "body_mib": self.max_body_mib,
            "megapixels": self.max_megapixels,
            "network_megapixels": self.max_network_megapixels,
            "images": self.max_images,
            "waiting": self.max_waiting,
            "waiting_mib": self.max_waiting_mib,
            "timeout_s": self.timeout,
            "drain_s": self.drain,
        }
        return {name: value for name, value in named.items() if value is not None}

    def layout(self) -> dict[str, Any]:
        """What is given of the sessions' layout, by the names of the server's model."""
        names = ("sessions", "threads", "max_batch", "max_wait_ms")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


class PredictionSettings(Settings):
    """How `srdeploy predict` reads and computes: the keys of its `--set`."""

    list: str | None = None
    """Text file, one photo a line."""
    probabilities: bool = False
    """Write npz with float16 [K, h, w] at the network's size; needs an artifact with logits."""
    rle: bool = False
    """Write JSON with COCO run lengths."""
    overlap: int | None = Field(default=None, ge=0)
    """Pixels that neighbouring tiles share. Default: a quarter of their shorter side."""
    max_megapixels: float = Field(default=200.0, gt=0, allow_inf_nan=False)
    """Skip larger photos."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of each session. Default: one session of one thread for each core."""
    batch: int | None = Field(default=None, ge=1)
    """Most photos of one size in a run. Default: 1 on CPUs, measured on GPUs."""
    ray_address: str | None = None
    """HOST:PORT of a running Ray cluster, or auto. Default: start one on this machine."""
    actors: int | None = Field(default=None, ge=1)
    """Processes of the cluster that hold the network. Default: as many as fit."""


def load_settings(
    model: type[Model],
    texts: Sequence[str],
    file: Path | None = None,
    file_model: type[Settings] | None = None,
) -> Model:
    """The settings in `file`, then those of `--set`, which win. Raises UserError naming the source
    and the key.

    file_model: the settings that the file may hold where these are fewer than `--set` takes.
    """
    values: dict[str, Any] = {}
    if file is not None:
        values = _read_yaml(file)
        validated(file_model or model, values, str(file))
    given = parse_options(texts, "--set", "KEY=VALUE")
    validated(model, given, "--set")
    return validated(model, {**values, **given}, "--set")


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        value = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark is not None else ""
        raise UserError(f"{path}: not valid YAML{where}") from error
    if not isinstance(value, dict | None):
        raise UserError(f"{path}: a YAML mapping of keys to values is needed")
    return value or {}
