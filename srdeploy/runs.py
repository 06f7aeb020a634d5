"""A run folder, read: which network was trained, on which spec, with which weights.

runs/NAME/  network.safetensors   the plain network, best on val          (export, serve, bench)
            exits.safetensors     the exits that trained it; absent for a baseline
            state.pt              everything needed to go on: weights, optimizer, step (train alone)
            config.yaml           the whole configuration; `network` is read here
            spec.json             pre- and post-processing
            metrics.jsonl         one record per logged step and per validation
            samples/              a few val photos, for checks on real images
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from srdeploy.errors import UserError
from srdeploy.files import read_json, read_text
from srdeploy.spec import Spec
from srdeploy.validation import Settings, validated

if TYPE_CHECKING:
    from torch import nn

WEIGHTS = "network.safetensors"
EXITS = "exits.safetensors"
STATE = "state.pt"
CONFIG = "config.yaml"
SPEC = "spec.json"
METRICS = "metrics.jsonl"
SAMPLES = "samples"


class NetworkConfig(Settings):
    """Which plain network to build, as data: the `network` section of a run's configuration."""

    name: str = "deeplabv2-mobilenetv2"
    """A name from `srdeploy.models.NETWORKS`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword options of its builder, e.g. {"output_stride": 8}."""


@dataclass(frozen=True)
class Run:
    """One finished or unfinished training run."""

    folder: Path
    spec: Spec
    network: NetworkConfig
    config: dict[str, Any]
    """The whole of config.yaml, unvalidated: train reads its own part."""

    @property
    def weights(self) -> Path:
        """The plain network's best weights."""
        return self.folder / WEIGHTS

    @property
    def exits(self) -> Path | None:
        """The exits' weights, or None for a baseline run."""
        path = self.folder / EXITS
        return path if path.exists() else None

    @property
    def samples(self) -> list[Path]:
        """Real photos kept for parity checks, sorted by name."""
        return sorted((self.folder / SAMPLES).glob("*.png"))


def is_run(path: Path) -> bool:
    """Whether `path` looks like a run folder."""
    return (path / CONFIG).is_file() and (path / SPEC).is_file()


def open_run(folder: Path) -> Run:
    """Reads a run folder. Raises UserError naming what is absent or broken."""
    import yaml

    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no such run folder: {folder}")
    if not is_run(folder):
        raise UserError(
            f"{folder} is not a run folder: it has no {CONFIG} and {SPEC} (see srdeploy train)"
        )
    try:
        config = yaml.safe_load(read_text(folder / CONFIG))
    except yaml.YAMLError as error:
        raise UserError(
            f"{folder / CONFIG}: not valid YAML ({str(error).splitlines()[0]})"
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("network"), dict):
        raise UserError(f"{folder / CONFIG}: no 'network' section: written by another tool?")
    spec = validated(Spec, read_json(folder / SPEC), str(folder / SPEC))
    network = validated(NetworkConfig, config["network"], str(folder / CONFIG))
    return Run(folder=folder, spec=spec, network=network, config=config)


def load_network(run: Run) -> "nn.Module":
    """The run's plain network with its best weights, in evaluation mode on the CPU. Raises
    UserError."""
    from srdeploy.models import make_network
    from srdeploy.models.weights import load_exactly

    if not run.weights.exists():
        raise UserError(
            f"{run.folder} has no {WEIGHTS} yet: the run stopped before its first validation"
        )
    network = make_network(run.network.name, run.spec.class_count, **run.network.options)
    load_exactly(network, run.weights)
    return network.eval()
