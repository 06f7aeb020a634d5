"""What every runtime of a graph or an engine shares: from its outputs to labels and logits."""

from abc import abstractmethod
from collections.abc import Collection, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from srdeploy.artifacts.artifact import Artifact
from srdeploy.errors import UserError
from srdeploy.imaging import Pixels, normalise
from srdeploy.runtimes.base import Logits, Runtime
from srdeploy.spec import Spec


class GraphRuntime(Runtime):
    """A graph whose signature says what it takes and gives; a child feeds it.

    `precision` names the types of the stored kernels until it is opened; an opened runtime has
    looked at what really computes.
    """

    def __init__(self, artifact: Artifact, spec: Spec, device: str) -> None:
        assert artifact.signature is not None
        super().__init__(artifact, spec, device, artifact.signature.shape)
        self.signature = artifact.signature
        self.precision = artifact.signature.precision

    @property
    def gives_logits(self) -> bool:
        """Whether the graph has an output with them."""
        return self.signature.logits is not None

    @abstractmethod
    def _infer(
        self, images: Pixels, feed: npt.NDArray[Any], outputs: list[str]
    ) -> Sequence[npt.NDArray[Any]]:
        """The named outputs for `feed`, contiguous and as the graph takes it; `images` are those
        that it was made from, for messages."""

    def _labels(self, images: Pixels) -> Pixels:
        if self.signature.labels is None:
            return cast(Pixels, self._logits(images).argmax(1).astype(np.uint8))
        (labels,) = self._infer(images, self._feed(images), [self.signature.labels])
        if labels.shape != images.shape[:3]:
            raise UserError(
                f"{self.path} gives labels {list(labels.shape)} for images {list(images.shape)}: "
                "labels of the images' own size are needed"
            )
        self._check_ids(labels)
        return labels.astype(np.uint8, copy=False)

    def _logits(self, images: Pixels) -> Logits:
        if self.signature.logits is None:
            raise UserError(
                f"{self.path} gives only labels: export with --output logits or both to get logits"
            )
        (logits,) = self._infer(images, self._feed(images), [self.signature.logits])
        if logits.ndim != 4 or logits.shape[1] != self.spec.class_count:
            raise UserError(
                f"{self.path} gives logits {list(logits.shape)}: its class list needs "
                f"[N, {self.spec.class_count}, H, W]"
            )
        return _upsample(logits.astype(np.float32, copy=False), images.shape[1], images.shape[2])

    def _feed(self, images: Pixels) -> npt.NDArray[Any]:
        """The images as the graph takes them: bytes, or planes that the client normalises."""
        if self.signature.input == "uint8":
            return np.ascontiguousarray(images)
        return np.ascontiguousarray(normalise(images, self.spec))

    def _check_ids(self, labels: npt.NDArray[np.integer[Any]]) -> None:
        """A cast to uint8 would turn a foreign graph's 256 into class 0."""
        count = self.spec.class_count
        if labels.min() >= 0 and labels.max() < count:
            return
        stray = labels[((labels < 0) | (labels >= count)) & (labels != self.spec.ignore_index)]
        if stray.size:
            raise UserError(
                f"{self.path} gives label {stray[0]}, but its class list has the ids "
                f"0..{count - 1}: give the list of the classes that it was trained with"
            )


def arithmetic(computed: Collection[str], stored: str) -> str:
    """How a graph with kernels of type `stored` computes, e.g. "float32 (stored as float16)".

    computed: types that its layers compute in; several are joined with +. Empty where no layer has
    weights: then the stored type is all that there is to say.
    """
    text = "+".join(sorted(computed)) or stored
    return text if text == stored else f"{text} (stored as {stored})"


def _upsample(logits: Logits, height: int, width: int) -> Logits:
    """Logits [N, K, h, w] at [N, K, height, width], bilinear with half-pixel centres.

    For foreign graphs: our own exports resize in the graph. Pillow's bilinear filter equals torch's
    half-pixel one where it enlarges, and only that is allowed.
    """
    count, classes, low_height, low_width = logits.shape
    if (low_height, low_width) == (height, width):
        return logits
    if low_height > height or low_width > width:
        raise UserError(
            f"the graph's logits are {low_height} x {low_width} for images of {height} x {width}: "
            "logits larger than the image are not understood"
        )
    enlarged = np.empty((count, classes, height, width), np.float32)
    for n in range(count):
        for k in range(classes):
            plane = Image.fromarray(np.ascontiguousarray(logits[n, k]))
            enlarged[n, k] = np.asarray(plane.resize((width, height), Image.Resampling.BILINEAR))
    return enlarged
