"""Made-up scenes: the same for a seed, with exact masks, and of the make they promise."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from srdeploy.data import open_dataset
from srdeploy.data.check import check_dataset
from srdeploy.data.scenery import FIGURES, Canvas, Stage, paint_animal
from srdeploy.data.synth import CLASSES, scene, synthesise
from srdeploy.errors import UserError
from srdeploy.imaging import Pixels

ID = {name: index for index, name in enumerate(CLASSES.names)}
STAGE = Stage(horizon=30, haze=(200.0, 200.0, 200.0), light=1.0)


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def scenes(count: int) -> list[tuple[Pixels, Pixels]]:
    return [scene(np.random.default_rng([5, number]), 96, 128) for number in range(count)]


def test_a_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        synthesise(tmp_path / name, train=2, val=1, test=0, width=80, height=64, seed=seed)
    one, two, other = (contents(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    assert len(one) == 7
    assert one["images/train/scene_00000.jpg"] != other["images/train/scene_00000.jpg"]


def test_more_scenes_keep_the_earlier_ones(tmp_path: Path) -> None:
    synthesise(tmp_path / "few", train=1, val=1, test=0, width=80, height=64)
    synthesise(tmp_path / "more", train=3, val=1, test=1, width=80, height=64)
    few, more = contents(tmp_path / "few"), contents(tmp_path / "more")
    assert all(more[name] == few[name] for name in few if name != "classes.json")


def test_made_up_scenes_open_and_pass_the_check(tmp_path: Path) -> None:
    synthesise(tmp_path / "s", train=3, val=2, test=1, width=96, height=64)
    data = open_dataset(tmp_path / "s", "train")
    assert data.classes.names == CLASSES.names
    photo, labels = data.read(0)
    assert photo.shape == (64, 96, 3)
    assert labels.shape == (64, 96)
    report = check_dataset(tmp_path / "s")
    assert report.passed
    assert {name: found.images for name, found in report.splits.items()} == {
        "train": 3,
        "val": 2,
        "test": 1,
    }


def test_cows_stand_by_fences_and_buffaloes_by_water_and_never_otherwise() -> None:
    kinds = set()
    for _, labels in scenes(30):
        present = set(np.unique(labels).tolist())
        assert (ID["cow"] in present) == (ID["fence"] in present)
        assert (ID["buffalo"] in present) == (ID["water"] in present)
        assert (ID["cow"] in present) != (ID["buffalo"] in present)
        kinds.add(ID["cow"] in present)
    assert kinds == {True, False}


def test_cow_and_buffalo_are_the_same_picture() -> None:
    photos = []
    for name in ("cow", "buffalo"):
        canvas = Canvas(96, 128)
        random = np.random.default_rng(0)
        paint_animal(canvas, random, STAGE, name, ID[name], (90, 64), 60, 0.0)
        assert (canvas.labels == ID[name]).any()
        photos.append(canvas.photo)
    np.testing.assert_array_equal(photos[0], photos[1])


def test_scenes_hold_small_and_large_things() -> None:
    maps = [labels for _, labels in scenes(20)]
    small = large = 0
    for labels in maps:
        for name in FIGURES:
            pieces, count = ndimage.label(labels == ID[name], np.ones((3, 3)))
            sizes = np.bincount(pieces.ravel(), minlength=count + 1)[1:]
            small += int(((sizes >= 16) & (sizes < 0.01 * labels.size)).sum())
            large += int((sizes >= 0.05 * labels.size).sum())
    assert small >= len(maps)
    assert large >= len(maps) // 2


@pytest.mark.parametrize("name", FIGURES)
def test_the_mask_is_what_was_painted_with_a_ring_of_void(name: str) -> None:
    canvas = Canvas(96, 128)
    canvas.photo[:] = 1000.0  # a value that no paint has
    paint_animal(canvas, np.random.default_rng(1), STAGE, name, ID[name], (90, 64), 70, 0.0)
    inside = canvas.labels == ID[name]
    untouched = canvas.labels == ID["background"]
    assert inside.sum() > 300
    ring = ndimage.binary_dilation(inside, np.ones((3, 3), np.bool_)) & ~inside
    np.testing.assert_array_equal(canvas.labels == 255, ring)
    # A shadow dims the ground, up to two fifths; paint of at least half coverage goes below that.
    assert canvas.photo[untouched].min() > 500
    assert canvas.photo[inside].max() < 650


@pytest.mark.parametrize("feet", [(5.0, 64.0), (90.0, -10.0), (110.0, 125.0), (-300.0, 64.0)])
def test_animals_are_cut_off_at_the_edges(feet: tuple[float, float]) -> None:
    canvas = Canvas(96, 128)
    paint_animal(canvas, np.random.default_rng(1), STAGE, "cow", ID["cow"], feet, 70, 0.0)
    assert canvas.photo.shape == (96, 128, 3)
    assert np.isfinite(canvas.photo).all()


def test_only_made_up_scenes_are_replaced_and_only_when_forced(tmp_path: Path) -> None:
    root = tmp_path / "s"
    root.mkdir()  # an empty folder is free
    synthesise(root, train=1, val=0, test=0, width=64, height=64)
    assert sorted(p.name for p in (root / "images").iterdir()) == ["train"]
    with pytest.raises(UserError, match="holds synthetic scenes already: --force replaces them"):
        synthesise(root, train=1, val=0, test=0, width=64, height=64)
    synthesise(root, train=0, val=1, test=0, width=64, height=64, force=True)
    assert sorted(p.name for p in (root / "images").iterdir()) == ["val"]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="home exists and holds no synthetic scenes"):
        synthesise(tmp_path / "home", force=True)
    assert (tmp_path / "home" / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": -1}, "none may be negative"),
        ({"train": 0, "val": 0, "test": 0}, "one must be positive"),
        ({"width": 40}, "scenes of 40x120: at least 64x64"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_wrong_numbers_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        synthesise(tmp_path / "s", **change)
    assert not (tmp_path / "s").exists()
