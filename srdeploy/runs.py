"""A run folder, read: which network was trained, on which spec, with which weights.

runs/NAME/  network.safetensors   the plain network, best on val          (export, serve, bench)
            exits.safetensors     the exits that trained it; absent for a baseline
            state.pt              what `train --resume` needs: weights, optimizer, step
            config.yaml           the whole configuration; `network` is read here
            spec.json             pre- and post-processing
            metrics.jsonl         one record per logged step and per validation
            samples/              a few val photos, for checks on real images
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from srdeploy.errors import UserError
from srdeploy.files import read_json, read_text
from srdeploy.spec import InputPolicy, Spec
from srdeploy.validation import Settings, validated

if TYPE_CHECKING:
    from torch import nn

    from srdeploy.models.auxiliary import AuxiliaryHead

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
    """A name from `srdeploy.models.NETWORKS`, or "package.module:function" for your own. Such code
    is imported and run wherever the network is built: by train, and by whatever opens the run."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword options of its builder, e.g. {"output_stride": 8}."""
    auxiliary: Literal["keep", "strip"] = "keep"
    """Heads that the network's own output does not depend on: trained along with it, or removed
    before training. What is deployed never has them."""

    @field_validator("options")
    @classmethod
    def _no_class_count(cls, options: dict[str, Any]) -> dict[str, Any]:
        if "classes" in options:
            raise ValueError("the number of classes comes from the class list: leave it away")
        return options

    @property
    def identity(self) -> dict[str, Any]:
        """What says which plain network it is, wherever that is recorded: name and options."""
        return self.model_dump(mode="json", include={"name", "options"})


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
    """Reads a run folder. Raises UserError naming what is absent or broken.

    Nothing of the run is executed yet. Loading its network is another matter where its name is
    that of code ("package.module:function"): that code is imported.
    """
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


def build_network(
    config: NetworkConfig, classes: int, size: tuple[int, int] | None = None
) -> "nn.Module":
    """The network that training starts from: fresh weights, training mode, on the CPU.

    Auxiliary heads are removed where config.auxiliary is "strip"; that runs the network once, on
    an image of `size` (H, W), PROBE_SIZE by default. Raises UserError.
    """
    from srdeploy.models import make_network

    network = make_network(config.name, classes, **config.options)
    if config.auxiliary == "strip":
        leave_out_auxiliary(network, config, size)
    return network


def leave_out_auxiliary(
    network: "nn.Module", config: NetworkConfig, size: tuple[int, int] | None = None
) -> "tuple[AuxiliaryHead, ...]":
    """Removes the heads that the main logits do not depend on, in place, and returns which.

    The built-in networks have none, and are not run. size: of the image that it is run on,
    (H, W). Raises UserError where the network can't run on it, or not without a head.
    """
    from srdeploy.models.auxiliary import find_auxiliary, remove_auxiliary
    from srdeploy.models.imported import is_imported
    from srdeploy.models.tracing import PROBE_SIZE

    if not is_imported(config.name):
        return ()
    heads = find_auxiliary(network, size or PROBE_SIZE)
    if heads:
        removed = remove_auxiliary(network, size or PROBE_SIZE)
        assert set(removed) == {head.name for head in heads}, "two searches found other heads"
    return heads


def require_usable(network: "nn.Module", config: NetworkConfig, spec: Spec) -> None:
    """Runs a network of a user's own code at two sizes that the spec promises; built-in ones take
    every size. Modes and torch's random numbers stay as they were.

    Raises UserError where it fails, naming the setting that would help, and where it gives another
    number of classes.
    """
    import torch

    from srdeploy.deployable import Deployable
    from srdeploy.models.imported import is_imported

    if not is_imported(config.name):
        return
    modes = [(module, module.training) for module in network.modules()]
    module = Deployable(network, spec, output="logits").eval()
    try:
        for size in dict.fromkeys((_odd_size(spec.input), spec.input.smallest)):
            try:
                with torch.random.fork_rng(devices=[]), torch.inference_mode():
                    found = module(torch.zeros((1, *size, 3), dtype=torch.uint8)).shape[1]
            except UserError:
                raise  # about the form of its output
            except Exception as error:
                reason = next(iter(str(error).strip().splitlines()), "no message")
                raise UserError(
                    f"network '{config.name}' fails on an image of {size[0]}x{size[1]} "
                    f"({type(error).__name__}: {reason}): {_remedy(size, spec.input)}"
                ) from error
            if found != spec.class_count:
                raise UserError(
                    f"network '{config.name}' gives {found} logits per pixel, but the class list "
                    f"has {spec.class_count} classes"
                )
    finally:
        for part, training in modes:
            part.training = training


def _odd_size(policy: InputPolicy) -> tuple[int, int]:
    """(H, W) that nothing divides, where the policy allows one: a network that takes only
    multiples fails on it."""
    height, width = policy.clamped((65, 97))
    if policy.fixed:
        return height, width
    return policy.clamped((height - 1 + height % 2, width - 1 + width % 2))


def _remedy(size: tuple[int, int], policy: InputPolicy) -> str:
    if policy.fixed:
        return "its one size must be one that it takes"
    if size == policy.smallest:
        return (
            "if it needs larger images, say from which size on (train: --set smallest=64x64; "
            "export: a spec.json with input.smallest as --classes)"
        )
    return (
        "if it takes only multiples of a size, say so (train: --set multiple=32; export: "
        "--set multiple=32); if only one size (train: --crop HxW --set fixed_size=true; export: "
        "--size HxW --set fixed_size=true)"
    )


def load_trained(run: Run) -> "nn.Module":
    """The run's network as it was trained, auxiliary heads included, with its best weights; in
    evaluation mode on the CPU. Raises UserError."""
    from srdeploy.models.tracing import PROBE_SIZE
    from srdeploy.models.weights import load_exactly

    if not run.weights.exists():
        raise UserError(
            f"{run.folder} has no {WEIGHTS} yet: the run stopped before its first validation"
        )
    network = build_network(run.network, run.spec.class_count, run.spec.input.near(PROBE_SIZE))
    load_exactly(network, run.weights)
    return network.eval()


def load_network(run: Run) -> "nn.Module":
    """The run's plain network as it is deployed: best weights, no auxiliary heads, in evaluation
    mode on the CPU. Raises UserError."""
    from srdeploy.models.tracing import PROBE_SIZE

    network = load_trained(run)
    leave_out_auxiliary(network, run.network, run.spec.input.near(PROBE_SIZE))
    return network
