"""What is exported: a run, or a network by name with weights, and the photos to compare it on."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from srdeploy import console
from srdeploy.artifacts.artifact import spec_from_classes
from srdeploy.data.synth import LEAST_SIDE, scene
from srdeploy.errors import UserError
from srdeploy.imaging import Pixels, first_photos, read_photo, scaled_size
from srdeploy.models import NETWORKS
from srdeploy.models.auxiliary import AuxiliaryHead
from srdeploy.models.imported import is_imported, require_alike
from srdeploy.models.tracing import PROBE_SIZE
from srdeploy.models.weights import load_without_prefix
from srdeploy.runs import (
    WEIGHTS,
    NetworkConfig,
    Run,
    build_network,
    leave_out_auxiliary,
    open_run,
    require_usable,
)
from srdeploy.spec import InputPolicy, Spec
from srdeploy.validation import closest, setting_flags, validated

MOST = 4
"""Photos taken from a folder."""

_SYNTHETIC = 3
_SYNTHETIC_SIDE = 240
"""Longest side of synthetic images, pixels; each size compared at is resized from it."""


@dataclass(frozen=True)
class Source:
    """A network to export, as data."""

    name: str
    """What its deploy folder is called by default."""
    network: NetworkConfig
    spec: Spec
    weights: Path | None
    """None: the network's code brings its own."""
    pictures: list[Pixels]
    """uint8 [H, W, 3], to compare torch and the exported file on."""
    synthetic: bool
    """Whether these were made up, for want of photos."""
    arguments: tuple[str, ...]
    """Of `srdeploy export`: what names this source."""
    training_data: Path | None = None
    """The folder that it was trained on, where that is known and there."""

    def build(self) -> tuple[nn.Module, tuple[AuxiliaryHead, ...]]:
        """The network as it is deployed: weights in, auxiliary heads out (and which these were),
        in evaluation mode on the CPU.

        Raises UserError where the weights don't fit, and where a user's network has another number
        of classes or does not take the sizes that the spec promises.
        """
        network = build_network(self.network, self.spec.class_count, self._probe_size)
        if self.weights is not None:
            prefix = load_without_prefix(network, self.weights)
            if prefix:
                console.say(f"{self.weights}: the prefix '{prefix}' of all names was left out")
        network.eval()
        require_usable(network, self.network, self.spec)
        return network, leave_out_auxiliary(network, self.network, self._probe_size)

    def build_fresh(self, built: nn.Module) -> nn.Module:
        """The same network once more, with fresh weights that no training has touched.

        Raises UserError where its code gives the weights of `built` again, or another network.
        """
        with torch.random.fork_rng(devices=[]):
            plain = build_network(self.network, self.spec.class_count, self._probe_size)
        leave_out_auxiliary(plain, self.network, self._probe_size)
        require_alike(self.network.name, built, plain)
        return plain

    @property
    def _probe_size(self) -> tuple[int, int]:
        return self.spec.input.near(PROBE_SIZE)


def open_source(
    target: str,
    *,
    weights: Path | None = None,
    classes: Path | None = None,
    options: Mapping[str, Any] | None = None,
    size: tuple[int, int] | None = None,
    multiple: int | None = None,
    fixed_size: bool = False,
    images: Path | None = None,
) -> Source:
    """The source that `target` names: a run folder, "package.module:function", or a built-in
    network's name.

    A run has all it needs; `images` (a folder of photos) takes the place of its samples. A network
    needs `classes` (classes.json, or a spec.json) and, where it is a built-in one, `weights`;
    without `images` it is compared on synthetic images. size: (H, W) that most images have;
    fixed_size: it takes only that size; multiple: it takes only multiples of this.
    Raises UserError where something is absent, unknown, or doesn't go with the target.
    """
    given = {
        "--weights": weights,
        "--classes": classes,
        "--option": options or None,
        "--size": size,
        "multiple": multiple,
        "fixed_size": fixed_size or None,
    }
    if Path(target).exists() or not (is_imported(target) or target in NETWORKS):
        _require_run(target)
        extra = next((flag for flag, value in given.items() if value is not None), None)
        if extra is not None:
            raise UserError(
                f"{target} is a run folder, which says by itself what {extra} would: leave it out"
            )
        return source_of_run(Path(target), images)
    if classes is None:
        raise UserError(
            f"network '{target}' needs --classes FILE: a classes.json with its class names, or a "
            "run's spec.json"
        )
    if weights is None:
        if not is_imported(target):
            raise UserError(f"network '{target}' needs --weights FILE: fresh ones are random")
        console.warn(f"no --weights: exporting the weights that {target} itself gives the network")
    spec = _with_sizes(spec_from_classes(classes), size, multiple, fixed_size)
    network = NetworkConfig(name=target, options=dict(options or {}))
    return Source(
        name=weights.stem if weights is not None else target.rpartition(":")[2],
        network=network,
        spec=spec,
        weights=weights,
        pictures=first_photos(images, MOST) if images is not None else synthetic_pictures(spec),
        synthetic=images is None,
        arguments=(target, *_flags({**given, "--images": images})),
    )


def source_of_run(folder: Path, images: Path | None = None) -> Source:
    """A run, compared on the photos in `images`, else on its own samples. Raises UserError."""
    run = open_run(folder)
    if not run.weights.exists():
        raise UserError(
            f"{run.folder} has no {WEIGHTS} yet: the run stopped before its first validation"
        )
    return Source(
        name=folder.resolve().name,
        network=run.network,
        spec=run.spec,
        weights=run.weights,
        pictures=parity_images(run, images),
        synthetic=False,
        arguments=(str(folder), *_flags({"--images": images})),
        training_data=_folder(run.config.get("data")),
    )


def _folder(text: object) -> Path | None:
    return Path(text) if isinstance(text, str) and Path(text).is_dir() else None


def _require_run(target: str) -> None:
    """Raises UserError where `target` is neither a path nor a network; open_run judges the rest."""
    if not Path(target).exists() and "/" not in target:
        raise UserError(
            f"no such run folder, and no network: {target}: {closest(target, NETWORKS)} "
            "(your own: PACKAGE.MODULE:FUNCTION)"
        )


def _with_sizes(
    spec: Spec, size: tuple[int, int] | None, multiple: int | None, fixed_size: bool
) -> Spec:
    """`spec` with the sizes that were asked for."""
    values: dict[str, Any] = spec.input.model_dump()
    if fixed_size:
        if size is None:
            raise UserError("fixed_size needs the size: --size HEIGHTxWIDTH")
        values |= {"smallest": size, "usual": size, "largest": size, "longest_side": None}
    elif size is not None:
        values["usual"] = size
        for key, choose in (("smallest", min), ("largest", max)):
            values[key] = tuple(map(choose, values[key], size))
    if multiple is not None:
        values["multiple"] = multiple
    return spec.model_copy(update={"input": validated(InputPolicy, values, "the sizes")})


def _flags(given: Mapping[str, Any]) -> list[str]:
    """The options of the command line that say what was given."""
    flags = []
    for flag, value in given.items():
        if flag == "--option":
            for key, part in (value or {}).items():
                flags += [flag, f"{key}={json.dumps(part)}"]
        elif flag == "--size" and value is not None:
            flags += [flag, f"{value[0]}x{value[1]}"]
        elif value is not None and not flag.startswith("--"):
            flags += setting_flags({flag: value})
        elif value is not None:
            flags += [flag, str(value)]
    return flags


def parity_images(run: Run, folder: Path | None) -> list[Pixels]:
    """Photos to compare on: those in `folder`, else those saved with the run. Raises UserError."""
    if folder is not None:
        return first_photos(folder, MOST)
    if not run.samples:
        raise UserError(
            f"{run.folder} has no sample photos to compare torch and the exported file on: "
            "give a folder of photos with --images"
        )
    return [read_photo(file) for file in run.samples[:MOST]]


def synthetic_pictures(spec: Spec) -> list[Pixels]:
    """Scenes of the usual size's proportions, in place of photos; always the same ones."""
    height, width = scaled_size(*spec.input.usual, _SYNTHETIC_SIDE)
    size = max(height, LEAST_SIDE), max(width, LEAST_SIDE)
    return [scene(np.random.default_rng(seed), *size)[0] for seed in range(_SYNTHETIC)]
