"""The random walk against plain float64 loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from srdeploy.errors import UserError
from srdeploy.train.weak import maps as weak_maps

few = settings(max_examples=10, deadline=None)


@few
@given(st.integers(2, 6), st.integers(2, 6), st.integers(1, 3), st.integers(0, 2**31))
def test_transitions_equal_a_plain_loop_in_float64(
    height: int, width: int, radius: int, seed: int
) -> None:
    cells = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))
    image = cells[0].double().numpy()
    sigma = image.reshape(3, -1).std(1)
    count = height * width
    expected = np.zeros((count, count))
    for i in range(count):
        for j in range(count):
            (r, c), (s, d) = divmod(i, width), divmod(j, width)
            if abs(r - s) <= radius and abs(c - d) <= radius:
                distance = np.mean(np.abs(image[:, r, c] - image[:, s, d]) / (1e-8 + sigma))
                expected[i, j] = np.exp(-distance) ** 10
    expected /= expected.sum(0)
    found = weak_maps.transitions(cells, radius, power=10.0)[0].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_steps_are_taken_one_after_the_other() -> None:
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(1, 3, 5, 6, generator=generator)
    maps = torch.rand(1, 2, 5, 6, generator=generator)
    found = weak_maps.walk(images, maps, grid=1, radius=2, power=10.0, steps=7)
    moves = weak_maps.transitions(images, 2, 10.0)[0].double()
    flat = maps[0].double().flatten(1)
    for _ in range(7):
        flat = flat @ moves.T
    torch.testing.assert_close(found[0].double().flatten(1), flat, atol=1e-5, rtol=1e-4)


def test_a_walk_keeps_the_sum_of_a_map() -> None:
    generator = torch.Generator().manual_seed(4)
    images = torch.rand(1, 3, 8, 8, generator=generator)
    maps = torch.rand(1, 1, 8, 8, generator=generator)
    found = weak_maps.walk(images, maps, grid=1, radius=3, power=5.0, steps=64)
    assert float(found.sum()) == pytest.approx(float(maps.sum()), rel=1e-4)


def test_a_grid_of_too_many_cells_is_refused() -> None:
    images, maps = torch.zeros(1, 3, 80, 80), torch.zeros(1, 1, 80, 80)
    with pytest.raises(UserError, match=r"6400 cells.*raise pseudo.walk_grid above 1"):
        weak_maps.walk(images, maps, grid=1, radius=2, power=1.0, steps=1)
