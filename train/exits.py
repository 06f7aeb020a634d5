"""Reading a network's inner feature maps without changing it: which, and how."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from srdeploy.errors import UserError
from srdeploy.models.auxiliary import find_auxiliary
from srdeploy.models.tracing import (
    PROBE_SIZE,
    FeatureMap,
    Size,
    Trace,
    first_part,
    token_grid,
    trace,
)
from srdeploy.train.encoder import encoder_levels
from srdeploy.train.regulation_config import RegulationConfig
from srdeploy.validation import closest

_READABLE = "exits read maps [N, C, H, W] or [N, H, W, C], or tokens [N, cells, C]"


@dataclass(frozen=True)
class TapChoice:
    """The modules whose outputs exits read, shallow to deep, and why they were chosen."""

    names: tuple[str, ...]
    maps: tuple[FeatureMap, ...]
    """The maps of the taps, as probed."""
    reasons: tuple[str, ...]
    """One line each."""
    source: Literal["stages", "traced", "given"]
    """Named by the network's `stages`, found by tracing a forward, or given by the caller."""


def choose_taps(network: nn.Module, size: Size = PROBE_SIZE) -> TapChoice:
    """The taps of any network: its `stages` where it names them, else found by tracing one forward
    (the rule: `srdeploy.train.encoder`).

    size: (H, W) of the probing image. Nothing of the network changes. Raises UserError for stages
    that can't be read, and where no level of an encoder is found.
    """
    stages = getattr(network, "stages", None)
    if isinstance(stages, tuple | list) and stages and all(isinstance(s, str) for s in stages):
        return _named(network, tuple(stages), size, "stages", "named by the network's stages")
    auxiliary = [head.name for head in find_auxiliary(network, size)]
    levels = encoder_levels(trace(network, size), auxiliary)
    if not levels:
        parts = ", ".join(name for name, _ in network.named_children()) or "none"
        raise UserError(
            f"no feature map of an encoder was found in {type(network).__name__}: pass taps=[...] "
            f"with module names, shallow to deep; its parts are {parts}"
        )
    return TapChoice(
        names=tuple(level.map.name for level in levels),
        maps=tuple(level.map for level in levels),
        reasons=tuple(level.reason for level in levels),
        source="traced",
    )


def given_taps(network: nn.Module, taps: Sequence[str], size: Size = PROBE_SIZE) -> TapChoice:
    """The taps that the caller names, shallow to deep, checked.

    Raises UserError for a name that the network lacks, listing close ones, for a name given twice,
    for a module whose output can't be read, and for names in another order than they run.
    """
    if isinstance(taps, str):
        raise UserError(f"taps is '{taps}': give \"auto\" or a list of module names")
    return _named(network, tuple(taps), size, "given", "given by name")


def _named(
    network: nn.Module,
    names: tuple[str, ...],
    size: Size,
    source: Literal["stages", "given"],
    why: str,
) -> TapChoice:
    if not names:
        raise UserError("taps is empty: name at least one module")
    for name in names:
        check_module(network, name, "tap")
    if len(set(names)) != len(names):
        raise UserError(f"taps must differ from each other, not {', '.join(names)}")
    found = trace(network, size)
    maps = tuple(_seen_map(found, name) for name in names)
    ran = [name for name in found.visits if name in names]
    if ran != list(names):
        raise UserError(
            f"taps must be named in the order they run, shallow to deep: {', '.join(ran)}"
        )
    reasons = tuple(f"{one.name} ({one.kind}): {why}" for one in maps)
    return TapChoice(names, maps, reasons, source)


def check_module(network: nn.Module, name: str, purpose: str) -> None:
    """Raises UserError where the network has no module `name`, with the closest name that it
    has."""
    known = [one for one, _ in network.named_modules() if one]
    if name in known:
        return
    # Dozens of names would bury the message: the direct parts stand for the rest.
    near = closest(name, known)
    if not near.startswith("did"):
        near = closest(name, [part for part, _ in network.named_children()])
    raise UserError(f"{type(network).__name__} has no module '{name}' to {purpose}: {near}")


def _seen_map(found: Trace, name: str) -> FeatureMap:
    """The map that a named module gave in the probe."""
    visit = found.visits.get(name)
    if visit is None:
        raise UserError(_idle(name))
    if visit.map is None:
        raise UserError(
            f"tap '{name}' gives {visit.given} for {found.size[0]}x{found.size[1]} images: "
            f"{_READABLE}"
        )
    if visit.modified:
        raise UserError(
            f"what tap '{name}' gives is overwritten in place later in the forward: name the "
            "module that does so (an activation with inplace=True, say) instead"
        )
    return visit.map


@contextmanager
def collected(network: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Collects the outputs of the modules `names` while the block runs the network.

    The dict fills in the order in which the modules ran. A module that runs several times in one
    forward leaves its last output. Hooks exist inside the block only, also when it raises.
    """
    outputs: dict[str, Any] = {}
    with ExitStack() as hooks:
        for name in names:
            module = network.get_submodule(name)
            hooks.enter_context(module.register_forward_hook(partial(_keep, outputs, name)))
        yield outputs


def feature_map(
    outputs: dict[str, Any], name: str, seen: FeatureMap | None = None, size: Size | None = None
) -> Tensor:
    """The map [N, C, h, w] that module `name` gave; of several parts the first.

    seen: how the probe read that module; without it the output must be [N, C, h, w]. size: (H, W)
    of the images, which tells the grid of tokens. Raises UserError naming the tap.
    """
    if name not in outputs:
        raise UserError(_idle(name))
    found = first_part(outputs[name])
    layout = "NCHW" if seen is None else seen.layout
    if not isinstance(found, Tensor) or found.dim() != len(layout):
        shape = f" of shape {tuple(found.shape)}" if isinstance(found, Tensor) else ""
        raise UserError(f"tap '{name}' gives {type(found).__name__}{shape}: {_READABLE}")
    if layout == "NHWC":
        return found.permute(0, 3, 1, 2)
    if layout == "NCHW" or seen is None:
        return found
    assert size is not None, "tokens need the image's size"
    cells = found.shape[1] - seen.skipped
    grid = token_grid(cells, size, seen.stride)
    if grid is None:
        raise UserError(
            f"tap '{name}' gives {cells} tokens for images of {size[0]}x{size[1]}: no grid of that "
            "many cells lies evenly on them"
        )
    return found[:, seen.skipped :].transpose(1, 2).reshape(len(found), -1, *grid)


def _idle(name: str) -> str:
    return f"tap '{name}' did not run in the network's forward: name a module that does"


def _keep(outputs: dict[str, Any], name: str, _module: nn.Module, _args: Any, output: Any) -> None:
    outputs.pop(name, None)  # a later output stands at its own place in the order
    outputs[name] = output


# Exits: a segmenter and a classifier at each tap, only in training

AUTHORS_WIDTH = 256


class ExitOutput(NamedTuple):
    """One exit's outputs for a batch."""

    logits: Tensor
    """[N, K, h, w], at the exit's own resolution."""
    class_logits: Tensor
    """[N, K], of the classes being present in the image."""
    hidden: Tensor
    """[N, C, h, w], the last map before the segmenter."""


class LeanExit(nn.Module):
    """The tap averaged to a coarse grid, 1x1 and 3x3 to `width` channels, then to K classes."""

    def __init__(self, channels: int, classes: int, width: int, window: int) -> None:
        """`window`: cells of the tap, per axis, that are averaged into one cell of the exit."""
        super().__init__()
        self.window = window
        self.reduce = unit(channels, width, 1)
        self.mix = unit(width, width, 3)
        self.segmenter = nn.Conv2d(width, classes, 1)
        self.classifier = nn.Linear(width, classes)

    def forward(self, features: Tensor) -> ExitOutput:
        """features [N, C, h, w] -> logits and hidden map at ceil(h / window), ceil(w / window)."""
        if self.window > 1:
            # Fixed windows: adaptive pooling's backward is not deterministic on CUDA.
            features = functional.avg_pool2d(features, self.window, ceil_mode=True)
        hidden = self.mix(self.reduce(features))
        return ExitOutput(self.segmenter(hidden), self.classifier(hidden.mean((2, 3))), hidden)


class AuthorsExit(nn.Module):
    """The published demo's head: two 3x3 convolutions to 256 channels, 1x1 to K.

    It works at the tap's own size; its classifier reads the segmentation logits' means.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.reduce = unit(channels, AUTHORS_WIDTH, 3)
        self.mix = unit(AUTHORS_WIDTH, AUTHORS_WIDTH, 3)
        self.segmenter = nn.Conv2d(AUTHORS_WIDTH, classes, 1)
        self.classifier = nn.Linear(classes, classes)

    def forward(self, features: Tensor) -> ExitOutput:
        """features [N, C, h, w] -> logits and hidden map at h, w."""
        hidden = self.mix(self.reduce(features))
        logits = self.segmenter(hidden)
        return ExitOutput(logits, self.classifier(logits.mean((2, 3))), hidden)


class Exits(nn.Module):
    """All exits of a regulated network: one per tap, and a classifier of the network's own output.

    Its state_dict is what exits.safetensors holds; the network's weights are not in it.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        classes: int,
        settings: RegulationConfig,
    ) -> None:
        """channels, strides: of the taps, shallow to deep; strides in input pixels per cell."""
        super().__init__()
        self.taps = nn.ModuleList()
        for width, stride in zip(channels, strides, strict=True):
            if settings.exits == "authors":
                self.taps.append(AuthorsExit(width, classes))
            else:
                window = max(1, -(-settings.min_stride // stride))
                self.taps.append(LeanExit(width, classes, settings.width, window))
        self.own_classifier = nn.Linear(classes, classes)

    def forward(self, features: Sequence[Tensor]) -> list[ExitOutput]:
        """features: one map [N, C, h, w] per tap, shallow to deep -> one output per tap."""
        return [tap(map_) for tap, map_ in zip(self.taps, features, strict=True)]

    def check_cells(self, features: Sequence[Tensor], names: Sequence[str]) -> None:
        """Raises UserError where an exit would train BatchNorm on one value per channel."""
        for tap, map_, name in zip(self.taps, features, names, strict=True):
            window = tap.window if isinstance(tap, LeanExit) else 1
            rows, columns = (-(-side // window) for side in map_.shape[2:])
            if map_.shape[0] * rows * columns == 1:
                raise UserError(
                    f"one image leaves the exit at '{name}' a single cell, and BatchNorm can't be "
                    "trained on one value: use a batch of 2 or more, or larger images"
                )

    def classify(self, logits: Tensor) -> Tensor:
        """The network's own logits [N, K, h, w] -> its class logits [N, K]."""
        found: Tensor = self.own_classifier(logits.mean((2, 3)))
        return found


def make_exits(
    channels: Sequence[int],
    strides: Sequence[int],
    classes: int,
    settings: RegulationConfig,
    like: Tensor,
) -> Exits:
    """New exits with the device and dtype of `like`, leaving torch's random state as it was.

    So a baseline and a regulated run with one seed draw the same weights, data and dropout.
    """
    with torch.random.fork_rng(devices=[]):
        return Exits(channels, strides, classes, settings).to(like.device, like.dtype)


def unit(channels: int, width: int, kernel: int) -> nn.Sequential:
    """Convolution, batch normalisation, ReLU; the size stays."""
    return nn.Sequential(
        nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    )
