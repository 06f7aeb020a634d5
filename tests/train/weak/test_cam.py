"""Maps over scales and mirrored photos, and what is kept of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from srdeploy.data.classes import colour_map
from srdeploy.deployable import Normalise
from srdeploy.errors import UserError
from srdeploy.spec import Spec
from srdeploy.train.weak.maps import (
    PhotoMaps,
    averaged_maps,
    of_tags,
    read_maps,
    to_highest,
    write_maps,
)
from srdeploy.train.weak.pseudo_run import PseudoConfig

SPEC = Spec(classes=("background", "a", "b"), palette=colour_map(3), ignore_index=255)


class Red:
    """A stand-in for a network: its one map is the photo's red, and it notes what sizes it saw."""

    classes = (1,)

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.sizes.append((images.shape[2], images.shape[3]))
        return images[:, :1].relu()


def photos(height: int = 64, width: int = 96) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (2, height, width, 3), generator=generator, dtype=torch.uint8)


def maps_of(config: PseudoConfig, images: Tensor) -> tuple[Tensor, Red]:
    red = Red()
    return averaged_maps(red, images, Normalise(SPEC), SPEC, config), red


def test_the_network_looks_at_every_scale_and_mirrored() -> None:
    _, red = maps_of(PseudoConfig(scales=(0.5, 1, 1.5)), photos())
    assert red.sizes == [(32, 48)] * 2 + [(64, 96)] * 2 + [(96, 144)] * 2


def test_maps_lie_on_the_grid() -> None:
    found, _ = maps_of(PseudoConfig(grid=4), photos(65, 97))
    assert found.shape == (2, 1, 17, 25)


def test_a_mirrored_photo_has_mirrored_maps() -> None:
    config = PseudoConfig(scales=(1.0,), grid=1)
    straight, _ = maps_of(config, photos())
    mirrored, _ = maps_of(config, photos().flip(2))
    torch.testing.assert_close(mirrored, straight.flip(3))


def test_a_map_of_one_look_is_that_of_the_network() -> None:
    found, _ = maps_of(PseudoConfig(scales=(1.0,), flip=False, grid=1), photos())
    torch.testing.assert_close(found, Normalise(SPEC)(photos())[:, :1].relu())


def test_activations_have_one_as_their_highest_each() -> None:
    maps = torch.tensor([[[1.0, 4.0]], [[0.5, 0.25]]])
    found = of_tags(maps, (1, 2), frozenset({1, 2}), background=0)
    assert found.maps.tolist() == [[[0.25, 1.0]], [[1.0, 0.5]]]


def test_a_map_of_zeros_stays_one() -> None:
    assert bool((to_highest(torch.zeros(1, 2, 2)) == 0).all())


def test_only_the_tags_are_kept() -> None:
    maps = torch.rand(3, 2, 2)
    found = of_tags(maps, (3, 5, 9), frozenset({9, 3}), background=0)
    assert found.classes == (3, 9)
    torch.testing.assert_close(torch.from_numpy(found.maps), to_highest(maps[[0, 2]]))


def test_a_teachers_probabilities_are_shared_out_over_tags_and_background() -> None:
    maps = torch.tensor([[[0.2]], [[0.5]], [[0.3]]])
    found = of_tags(maps, (0, 1, 2), frozenset({2}), background=0)
    assert found.classes == (0, 2)
    np.testing.assert_allclose(found.maps.ravel(), [0.4, 0.6], atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 3), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31))
def test_kept_maps_come_back_to_half_a_level(
    tmp_path_factory: pytest.TempPathFactory, count: int, height: int, width: int, seed: int
) -> None:
    maps = np.random.default_rng(seed).random((count, height, width)).astype(np.float32)
    path = tmp_path_factory.mktemp("maps") / "sub" / "one.npz"
    write_maps(path, PhotoMaps(tuple(range(1, count + 1)), maps))
    found = read_maps(path)
    assert found.classes == tuple(range(1, count + 1))
    np.testing.assert_allclose(found.maps, maps, atol=0.5 / 255 + 1e-6)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"no archive at all"])
def test_a_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.npz: absent or broken"):
        read_maps(path)
