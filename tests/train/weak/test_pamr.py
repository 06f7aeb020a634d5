"""PAMR against a plain float64 loop over pixels, written out from the formula."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from srdeploy.train.weak import maps as weak_maps

Floats = NDArray[np.float64]
few = settings(max_examples=10, deadline=None)
sizes = st.tuples(st.integers(1, 7), st.integers(1, 7))
dilation_lists = st.sampled_from([(1,), (1, 2), (2, 5), (1, 2, 4)])
seeds = st.integers(0, 2**31)


def made(size: tuple[int, int], seed: int, maps: int = 2, batch: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(batch, 3, *size, generator=generator)
    return images, torch.rand(batch, maps, *size, generator=generator)


def by_loops(image: Floats, maps: Floats, dilations: tuple[int, ...], steps: int) -> Floats:
    """image [3, H, W], maps [C, H, W]: one pixel, one neighbour at a time."""
    _, height, width = image.shape

    def place(row: int, column: int) -> tuple[int, int]:
        return min(max(row, 0), height - 1), min(max(column, 0), width - 1)

    for _ in range(steps):
        mixed = np.zeros_like(maps)
        for row in range(height):
            for column in range(width):
                around, window = [], []
                for distance in dilations:
                    for down in (-1, 0, 1):
                        for across in (-1, 0, 1):
                            there = place(row + down * distance, column + across * distance)
                            window.append(image[:, there[0], there[1]])
                            if down or across:
                                around.append(there)
                sigma = np.std(np.array(window), axis=0, ddof=1)
                here = image[:, row, column]
                likeness = np.array(
                    [
                        np.mean(-np.abs(here - image[:, r, c]) / (1e-8 + 0.1 * sigma))
                        for r, c in around
                    ]
                )
                weights = np.exp(likeness - likeness.max())
                weights /= weights.sum()
                for weight, (r, c) in zip(weights, around, strict=True):
                    mixed[:, row, column] += weight * maps[:, r, c]
        maps = mixed
    return maps


@few
@given(sizes, dilation_lists, seeds)
def test_refinement_equals_a_plain_loop_in_float64(
    size: tuple[int, int], dilations: tuple[int, ...], seed: int
) -> None:
    images, maps = made(size, seed)
    found = weak_maps.refine(images, maps, dilations, steps=3)[0].numpy()
    expected = by_loops(images[0].double().numpy(), maps[0].double().numpy(), dilations, steps=3)
    np.testing.assert_allclose(found, expected, atol=2e-4)


@few
@given(sizes, dilation_lists, seeds, st.integers(1, 4))
def test_no_value_leaves_the_range_of_its_map(
    size: tuple[int, int], dilations: tuple[int, ...], seed: int, steps: int
) -> None:
    images, maps = made(size, seed)
    found = weak_maps.refine(images, maps, dilations, steps)
    assert bool((found <= maps.amax((2, 3), keepdim=True) + 1e-5).all())
    assert bool((found >= maps.amin((2, 3), keepdim=True) - 1e-5).all())


def test_photos_of_a_batch_do_not_touch_each_other() -> None:
    images, maps = made((6, 9), seed=1, batch=3)
    together = weak_maps.refine(images, maps, (1, 2), steps=4)
    alone = torch.cat(
        [weak_maps.refine(images[i : i + 1], maps[i : i + 1], (1, 2), 4) for i in range(3)]
    )
    torch.testing.assert_close(together, alone)


def test_a_map_spreads_to_the_edge_of_its_region_and_not_beyond() -> None:
    """A spot in the left half of a two-coloured photo comes to fill that half alone."""
    images = torch.zeros(1, 3, 16, 16)
    images[..., 8:] = 1
    images += 0.01 * torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    maps = torch.zeros(1, 1, 16, 16)
    maps[:, :, 6:10, 2:6] = 1
    found = weak_maps.refine(images, maps, (1, 2, 4), steps=20)[0, 0]
    left, right = float(found[:, :8].mean()), float(found[:, 8:].mean())
    assert left > 20 * right


def test_a_brighter_photo_gives_the_same_weights() -> None:
    images, _ = made((8, 8), seed=2)
    one, other = (weak_maps.neighbour_weights(k * images, (1, 2)) for k in (1.0, 255.0))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
