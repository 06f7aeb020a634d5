"""The stream of samples: what it depends on, and what it must not depend on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from srdeploy.data import open_dataset, spec_for
from srdeploy.errors import UserError
from srdeploy.train.augment import augmentation_for
from srdeploy.train.config import TrainConfig
from srdeploy.train.loader import Batch, Samples, batches

pytestmark = pytest.mark.wheel


def samples(root: Path, **changes: object) -> Samples:
    config = TrainConfig.model_validate({"data": root, "crop": (32, 40), **changes})
    dataset = open_dataset(root, "train")
    spec = spec_for(dataset, longest_side=config.longest_side)
    return Samples(dataset, spec, augmentation_for(config, spec), config.seed, config.cache_mib)


def equal(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.images, y.images) and torch.equal(x.labels, y.labels)
        for x, y in zip(a, b, strict=True)
    )


def test_batches_are_the_same_for_any_number_of_threads_and_any_cache(tiny_data: Path) -> None:
    alone = list(batches(samples(tiny_data), 4, 0, 5, workers=0))
    assert equal(alone, list(batches(samples(tiny_data), 4, 0, 5, workers=2)))
    assert equal(alone, list(batches(samples(tiny_data, cache_mib=0), 4, 0, 5, workers=3)))


def test_starting_in_the_middle_gives_the_same_batches(tiny_data: Path) -> None:
    whole = list(batches(samples(tiny_data), 4, 0, 6, workers=0))
    assert equal(whole[3:], list(batches(samples(tiny_data), 4, 3, 6, workers=2)))


def test_batches_have_the_crops_size_and_are_bytes(tiny_data: Path) -> None:
    (batch,) = batches(samples(tiny_data), 3, 0, 1, workers=0)
    assert batch.images.shape == (3, 32, 40, 3)
    assert batch.labels.shape == (3, 32, 40)
    assert batch.images.dtype == batch.labels.dtype == torch.uint8


def test_every_epoch_shows_every_photo_once_in_an_order_of_its_own(tiny_data: Path) -> None:
    stream = samples(tiny_data)
    epochs = [[stream.index(6 * epoch + place) for place in range(6)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_another_seed_gives_another_order_and_other_views(tiny_data: Path) -> None:
    one, other = samples(tiny_data), samples(tiny_data, seed=1)
    assert [one.index(p) for p in range(12)] != [other.index(p) for p in range(12)]
    assert not np.array_equal(one.read(0)[0], other.read(0)[0])


def test_a_photo_comes_in_another_view_each_time(tiny_data: Path) -> None:
    stream = samples(tiny_data)
    again = next(p for p in range(6, 12) if stream.index(p) == stream.index(0))
    assert not np.array_equal(stream.read(0)[0], stream.read(again)[0])


def test_photos_are_brought_to_the_size_that_the_network_sees(tiny_data: Path) -> None:
    plain = {"scale": (1, 1), "flip": 0, "colour": 0, "crop": (80, 96)}
    stream = samples(tiny_data, longest_side=96, **plain)
    photo, labels = stream.dataset.read(stream.index(0))
    view, mask, *_ = stream.read(0)
    assert mask.shape == (80, 96)
    assert np.array_equal(mask, labels.repeat(2, axis=0).repeat(2, axis=1))
    doubled = Image.fromarray(photo).resize((96, 80), Image.Resampling.BILINEAR)
    assert np.array_equal(view, np.asarray(doubled))


def test_the_cache_stays_within_its_room(tiny_data: Path) -> None:
    stream = samples(tiny_data, cache_mib=0)
    stream.read(0)
    assert not stream._cache
    stream = samples(tiny_data)
    for position in range(6):
        stream.read(position)
    assert len(stream._cache) == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_photo_is_named(tmp_path: Path, workers: int) -> None:
    for kind in ("images", "labels"):
        (tmp_path / kind / "train").mkdir(parents=True)
    table = {"names": ["a", "b"], "palette": [[0, 0, 0], [9, 9, 9]]}
    (tmp_path / "classes.json").write_text(json.dumps(table))
    blank = Image.new("L", (40, 40))
    for name in ("one", "two"):
        blank.convert("RGB").save(tmp_path / f"images/train/{name}.png")
        blank.save(tmp_path / f"labels/train/{name}.png")
    stream = samples(tmp_path)
    (tmp_path / "images/train/two.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(UserError, match=r"two\.png: not a readable image"):
        list(batches(stream, 2, 0, 2, workers))
