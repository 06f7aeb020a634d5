"""The second half of augmentation as tensors, where the device has more time than the threads that
read: mirroring and colours. Scaling and cropping stay with the threads, as they leave less to
send."""

from collections.abc import Sequence

import torch
from torch import Tensor

from srdeploy.train.augment import GRAY


def varied(images: Tensor, maps: Sequence[Tensor], looks: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Crops with their looks applied: uint8 [N, H, W, 3] and uint8 [N, H, W] each.

    images, maps: as that, the maps being labels and what else lies over the photos; looks:
    float32 [N, 8], in the order of `train.augment.Look`'s fields.
    Equals `train.augment.augment` to one level of 255. Nothing waits for the device.
    """
    count, height, width = images.shape[:3]
    brightness, contrast, saturation, mirrored, top, left, high, wide = looks.unbind(1)

    # What the photo fills: the ground around it keeps its colour, and counts for no mean.
    down = torch.arange(height, device=images.device)
    across = torch.arange(width, device=images.device)
    rows = (down >= top[:, None]) & (down < (top + high)[:, None])
    columns = (across >= left[:, None]) & (across < (left + wide)[:, None])
    filled = (rows[:, :, None] & columns[:, None, :])[..., None]

    # One affine map of the colour, as train.augment.jitter derives it.
    values = images.float()
    # Filled on the device: a copy from here would wait for it.
    gray = torch.cat([torch.full((1,), weight, device=images.device) for weight in GRAY])
    mean = ((values @ gray) * filled[..., 0]).sum((1, 2)) / (high * wide) * brightness
    one = torch.eye(3, device=images.device)
    mix = saturation[:, None, None] * one + (1 - saturation)[:, None, None] * gray
    matrix = mix * (brightness * contrast)[:, None, None]
    shift = (1 - contrast) * mean
    flat = values.reshape(count, -1, 3) @ matrix.transpose(1, 2) + shift[:, None, None]
    found = flat.reshape(values.shape).round().clamp(0, 255).to(torch.uint8)
    found = torch.where(filled, found, images)

    turned = mirrored.bool()
    return (
        torch.where(turned[:, None, None, None], found.flip(2), found),
        [torch.where(turned[:, None, None], each.flip(2), each) for each in maps],
    )
