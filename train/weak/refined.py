"""Maps at the photo's own grid: brought there, refined along its edges, and scaled again."""

from dataclasses import replace

import numpy as np
import torch

from srdeploy.imaging import Pixels
from srdeploy.outputs import resize_logits
from srdeploy.train.weak import pamr, random_walk
from srdeploy.train.weak.cam import PhotoMaps, to_highest
from srdeploy.train.weak.pseudo_config import PseudoConfig


def at_size(found: PhotoMaps, size: tuple[int, int]) -> PhotoMaps:
    """The maps at `size` (H, W), unrefined."""
    if not found.classes:
        return replace(found, maps=np.zeros((0, *size), np.float32))
    maps = resize_logits(torch.from_numpy(found.maps)[None], size)[0]
    return replace(found, maps=maps.numpy())


def refined(
    photos: list[Pixels],
    found: list[PhotoMaps],
    background: int,
    config: PseudoConfig,
    device: torch.device,
) -> list[PhotoMaps]:
    """Maps of photos of one size uint8 [H, W, 3], at that size, as `config.refine` says.

    Photos with fewer classes than others take part with maps of zeros, which stay zeros.
    """
    size = (photos[0].shape[0], photos[0].shape[1])
    most = max(len(one.classes) for one in found)
    if config.refine == "none" or most == 0:
        return [at_size(one, size) for one in found]
    stacked = torch.zeros(len(found), most, *found[0].maps.shape[1:])
    for row, one in enumerate(found):
        stacked[row, : len(one.classes)] = torch.from_numpy(one.maps)
    images = torch.from_numpy(np.stack(photos)).to(device).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        maps = resize_logits(stacked.to(device), size)
        if config.refine == "pamr":
            maps = pamr.refine(images, maps, config.pamr_dilations, config.pamr_steps)
        else:
            maps = random_walk.walk(
                images,
                maps,
                config.walk_grid,
                config.walk_radius,
                config.walk_power,
                config.walk_steps,
            )
        scaled = to_highest(maps)
    results = []
    for row, one in enumerate(found):
        # A teacher's probabilities stay what they are: refinement keeps their sum.
        kept = maps if background in one.classes else scaled
        results.append(replace(one, maps=kept[row, : len(one.classes)].cpu().numpy()))
    return results
