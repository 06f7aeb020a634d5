"""A network's encoder as a multi-label classifier, whose class activation maps point at what it
recognises.

Source of the maps: Zhou et al., "Learning Deep Features for Discriminative Localization" (CVPR
2016). N batch, K tagged classes, C channels, H, W of the images, h, w of a map.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from srdeploy.errors import UserError
from srdeploy.models.auxiliary import find_auxiliary
from srdeploy.models.tracing import PROBE_SIZE, FeatureMap, Size, Trace, trace
from srdeploy.train import losses
from srdeploy.train.encoder import encoder_levels
from srdeploy.train.exits import choose_taps, collected, feature_map, given_taps, unit
from srdeploy.train.regulation import Losses
from srdeploy.train.regulation_config import RegulationConfig, ramp

BACKBONE = "backbone"
"""The sub-module whose output is read where the network has one of this name that gives a map."""


@dataclass(frozen=True)
class TagOutputs:
    """The classifiers' outputs for a batch."""

    class_logits: list[Tensor]
    """[N, K] each, shallow to deep; the last is the network's own classifier."""
    maps: Tensor
    """[N, K, h, w]: at each cell what it adds to the last one's logits, of which they are the
    means."""


class TagExit(nn.Module):
    """MEA's classifier at one stage: pooled, 1x1 and 3x3 to `width` channels, then to K classes."""

    def __init__(self, channels: int, classes: int, width: int, window: int) -> None:
        """`window`: cells of the tap, per axis, that are averaged into one cell of the exit."""
        super().__init__()
        self.window = window
        self.reduce = unit(channels, width, 1)
        self.mix = unit(width, width, 3)
        self.classifier = nn.Linear(width, classes)

    def forward(self, features: Tensor) -> Tensor:
        """features [N, C, h, w] -> class logits [N, K]."""
        if self.window > 1:
            features = functional.avg_pool2d(features, self.window, ceil_mode=True)
        found: Tensor = self.classifier(self.mix(self.reduce(features)).mean((2, 3)))
        return found


class TagNetwork(nn.Module):
    """The encoder of any segmentation network, classified by a 1x1 convolution and a global mean.

    network: its decoder and head do not run. classes: K. With `settings.enabled` False there is
    only this one classifier; else one at each stage before it too (MEA), which it teaches context
    (SR-L): of `settings` cls_weight, srl_weight, start, ramp, temperature, width, min_stride and
    taps are read. Raises UserError for taps that can't be read, and where no encoder is found.
    """

    def __init__(
        self,
        network: nn.Module,
        classes: int,
        settings: RegulationConfig,
        probe_size: Size = PROBE_SIZE,
    ) -> None:
        super().__init__()
        self.network = network
        self.settings = settings
        seen = trace(network, probe_size)
        self.source = _deepest(network, seen)
        """The map that is classified."""
        self.stages: tuple[FeatureMap, ...] = ()
        """Those of the exits, shallow to deep."""
        if settings.enabled:
            self.stages = _stages_before(network, settings, seen, self.source)
        with torch.random.fork_rng(devices=[]):
            # One start for both: the regulated network's exits draw nothing from the run's numbers.
            self.classifier = nn.Conv2d(self.source.channels, classes, 1)
            nn.init.normal_(self.classifier.weight, std=0.01)
            nn.init.zeros_(self.classifier.bias)  # type: ignore[arg-type]
            self.exits = nn.ModuleList(
                TagExit(
                    one.channels,
                    classes,
                    settings.width,
                    max(1, -(-settings.min_stride // one.stride)),
                )
                for one in self.stages
            )

    def forward(self, images: Tensor) -> TagOutputs:
        """images float32 [N, 3, H, W], normalised."""
        size = (images.shape[2], images.shape[3])
        names = [one.name for one in (*self.stages, self.source)]
        with collected(self.network, names) as outputs, _ends_at(self.network, self.source.name):
            self.network(images)
        maps = self.classifier(feature_map(outputs, self.source.name, self.source, size))
        logits = [
            exit_(feature_map(outputs, one.name, one, size))
            for exit_, one in zip(self.exits, self.stages, strict=True)
        ]
        return TagOutputs([*logits, maps.mean((2, 3))], maps)

    def losses(self, images: Tensor, tags: Tensor, progress: float) -> Losses:
        """One step's losses, ready for backward; usable under autocast.

        images: as in forward; tags: float32 [N, K] of 0 and 1; progress: share of the training
        that is done, 0..1. Terms: "main", and with exits "cls", and "srl" once feedback began.
        """
        outputs = self(images)
        settings = self.settings
        with torch.autocast(tags.device.type, enabled=False):
            every = torch.ones(len(tags), dtype=torch.bool, device=tags.device)
            *shallow, deepest = outputs.class_logits
            terms = {"main": losses.classification(deepest, tags, every)}
            weights = {"main": 1.0}
            if shallow and settings.cls_weight > 0:
                found = [losses.classification(one, tags, every) for one in shallow]
                terms["cls"], weights["cls"] = torch.stack(found).sum(), settings.cls_weight
            strength = settings.srl_weight * ramp(progress, settings.start, settings.ramp)
            if shallow and strength > 0:
                found = [
                    losses.class_feedback(one, deepest, every, settings.temperature)
                    for one in shallow
                ]
                terms["srl"], weights["srl"] = torch.stack(found).sum(), strength
            total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        return Losses(total, {name: term.detach() for name, term in terms.items()})

    def activation(self, images: Tensor) -> Tensor:
        """Class activation maps, ReLU(w_k . F): images [N, 3, H, W] -> float32 [N, K, h, w]."""
        maps: Tensor = self(images).maps.float()
        # Without the bias, which points nowhere.
        assert self.classifier.bias is not None
        return (maps - self.classifier.bias.float()[:, None, None]).relu()


class _Ended(Exception):
    """The map that is wanted has been made."""


@contextmanager
def _ends_at(network: nn.Module, name: str) -> Iterator[None]:
    """Ends the forward in the block once the module `name` has run: what follows is not needed."""

    def stop(_module: nn.Module, _args: object, _output: object) -> None:
        raise _Ended

    handle = network.get_submodule(name).register_forward_hook(stop)
    try:
        yield
    except _Ended:
        pass
    finally:
        handle.remove()


def _deepest(network: nn.Module, seen: Trace) -> FeatureMap:
    """The encoder's last map."""
    whole = seen.visits.get(BACKBONE)
    if whole is not None and whole.map is not None and not whole.modified:
        return whole.map
    heads = [head.name for head in find_auxiliary(network, seen.size)]
    levels = encoder_levels(seen, heads)
    if not levels:
        raise UserError(
            f"no feature map of an encoder was found in {type(network).__name__}: image tags can "
            "only train a network that has one"
        )
    return levels[-1].map


def _stages_before(
    network: nn.Module, settings: RegulationConfig, seen: Trace, source: FeatureMap
) -> tuple[FeatureMap, ...]:
    """The taps that run before the deepest map is made."""
    if settings.taps == "auto":
        choice = choose_taps(network, seen.size)
    else:
        choice = given_taps(network, settings.taps, seen.size)
    order = list(seen.visits)
    return tuple(m for m in choice.maps if order.index(m.name) < order.index(source.name))
