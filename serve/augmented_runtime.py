"""A runtime that averages over several views of each image: scales and mirror images."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from srdeploy.errors import UserError
from srdeploy.imaging import Pixels, strongest
from srdeploy.serve.runtime import Logits, Runtime
from srdeploy.serve.wrapped_runtime import WrappedRuntime


class AugmentedRuntime(WrappedRuntime):
    """Test-time augmentation: the classes' probabilities are averaged over the views.

    Its logits are the logarithms of the mean probabilities: softmax gives these back. Scale 1 alone
    gives what the inner runtime gives, bit for bit.
    """

    def __init__(self, inner: Runtime, scales: Sequence[float], flip: bool) -> None:
        """scales: relative to the images' size. flip: each also mirrored left to right. Raises
        UserError where the graph gives no logits, or takes one size alone."""
        if not inner.gives_logits:
            raise UserError(
                f"{inner.path} gives labels alone, and scales and mirrored images are averaged "
                "over logits: export it with --output both"
            )
        fixed = inner.spec.input.fixed or inner.input_shape[1:3] != (None, None)
        if fixed and set(scales) != {1.0}:
            raise UserError(f"{inner.path} takes images of one size alone: leave --scales away")
        super().__init__(inner, inner.spec, inner.input_shape)
        self._scales = tuple(scales)
        self._flip = flip
        self._plain = not flip and set(scales) == {1.0}

    def _labels(self, images: Pixels) -> Pixels:
        if self._plain:
            return self.inner.run(images)
        return np.stack([strongest(mean) for mean in self._mean(images)])

    def _logits(self, images: Pixels) -> Logits:
        if self._plain:
            return self.inner.logits(images)
        mean = self._mean(images)
        logits: Logits = np.log(np.maximum(mean, np.finfo(np.float32).tiny))
        return logits

    def _mean(self, images: Pixels) -> Logits:
        """Mean probabilities float32 [N, K, H, W] of images uint8 [N, H, W, 3]."""
        size = images.shape[1:3]
        total: Logits | None = None
        for scale in self._scales:
            view = self._scaled(images, scale)
            for mirrored in (False, True) if self._flip else (False,):
                logits = self.inner.logits(view[:, :, ::-1] if mirrored else view)
                logits = _resized(logits[..., ::-1] if mirrored else logits, size[0], size[1])
                shares = _softmax(logits)
                if total is None:
                    total = shares
                else:
                    total += shares
        assert total is not None
        total /= np.float32(len(self._scales) * (2 if self._flip else 1))
        return total

    def _scaled(self, images: Pixels, scale: float) -> Pixels:
        """The images at `scale` times their size, and no smaller than the network takes them."""
        height, width = (
            max(round(images.shape[1 + axis] * scale), self.spec.input.smallest[axis])
            for axis in (0, 1)
        )
        if (height, width) == images.shape[1:3]:
            return images
        return np.stack(
            [
                np.asarray(Image.fromarray(one).resize((width, height), Image.Resampling.BILINEAR))
                for one in images
            ]
        )


def _resized(logits: Logits, height: int, width: int) -> Logits:
    """Logits [N, K, h, w] at [N, K, height, width], bilinear with half-pixel centres; where they
    shrink, each takes the mean of what lies under it, as photos do."""
    if logits.shape[2:] == (height, width):
        return logits
    resized = np.empty((*logits.shape[:2], height, width), np.float32)
    for own, planes in zip(resized, logits, strict=True):
        for target, plane in zip(own, planes, strict=True):
            image = Image.fromarray(np.ascontiguousarray(plane))
            target[:] = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    return resized


def _softmax(logits: Logits) -> Logits:
    """Over K of logits [N, K, H, W], in float32."""
    shares: Logits = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    return shares
