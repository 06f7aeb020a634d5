"""Confidence on its way from the data set into the losses of a run."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from srdeploy.data import DataSet, open_dataset
from srdeploy.errors import UserError
from srdeploy.runs import EXITS, METRICS, STATE, WEIGHTS, NetworkConfig
from srdeploy.train import loop
from srdeploy.train.augment import Augmentation, augment
from srdeploy.train.config import TrainConfig
from srdeploy.train.loader import Batch, Samples, batches, collate
from srdeploy.train.loop import train
from srdeploy.train.optimize import accumulate_gradient
from srdeploy.train.recorder import read_metrics
from srdeploy.train.regulation_config import RegulationConfig
from srdeploy.train.start import prepare

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums over threads may be taken in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_confidence(root: Path, make: Any) -> Path:
    """confidence/ for the masks of split train alone: make(labels uint8 [H, W]) -> uint8 [H, W]."""
    (root / "confidence/labels/train").mkdir(parents=True)
    for mask in (root / "labels/train").iterdir():
        values = make(np.asarray(Image.open(mask)))
        Image.fromarray(values).save(root / "confidence" / mask.relative_to(root))
    return root


def drawn(labels: np.ndarray) -> np.ndarray:
    """A confidence of all grays, other ones for each mask."""
    rng = np.random.default_rng(int(labels.astype(int).sum()))
    return rng.integers(0, 256, labels.shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def unsure(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("unsure") / "data"
    shutil.copytree(tiny_data, root)
    return write_confidence(root, drawn)


def config_for(data: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(
        data=data,
        network=NetworkConfig(name="unet", options={"width": 4}),
        **{
            **{"regulation": RegulationConfig(width=8, start=0, ramp=0), "batch": 2, "steps": 6},
            **{"crop": (32, 40), "lr": 0.05, "log_every": 1, "val_every": 3, "workers": 1},
            **{"confidence": True, "device": "cpu", **changes},
        },
    )


@given(
    height=st.integers(20, 90),
    width=st.integers(20, 90),
    flip=st.sampled_from([0.0, 0.5, 1.0]),
    on_device=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_confidence_stays_on_its_labels_and_changes_nothing_else(
    height: int, width: int, flip: float, on_device: bool, seed: int
) -> None:
    how = Augmentation((32, 48), (0.5, 2.0), flip, 0.25, (124, 116, 104), 255, on_device)
    rng = np.random.default_rng(seed)
    photo = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    labels = rng.integers(0, 200, (height, width), dtype=np.uint8)
    with_it = augment(photo, labels, how, np.random.default_rng(seed), labels + np.uint8(7))
    without = augment(photo, labels, how, np.random.default_rng(seed))
    assert with_it.look == without.look
    ours, theirs = (collate([one, one], 0).to(CPU) for one in (with_it, without))
    assert torch.equal(ours.images, theirs.images)
    assert torch.equal(ours.labels, theirs.labels)
    assert theirs.confidence is None
    assert ours.confidence is not None
    assert ours.confidence.dtype == torch.uint8
    # The ground around a photo that is smaller than the crop is not sure of anything.
    expected = torch.where(ours.labels == 255, 0, ours.labels + 7)
    assert torch.equal(ours.confidence, expected)


def test_both_places_of_augmentation_give_the_same_confidence(unsure: Path) -> None:
    samples = prepare(config_for(unsure, augment_on="threads")).data.samples
    on_device = Samples(
        samples.dataset, samples.spec, replace(samples.how, on_device=True), 0, 0, confidence=True
    )
    for ours, theirs in zip(
        batches(on_device, 3, 0, 4, 2), batches(samples, 3, 0, 4, 0), strict=True
    ):
        mine, other = ours.to(CPU).confidence, theirs.confidence
        assert mine is not None
        assert other is not None
        assert torch.equal(mine, other)


@pytest.mark.parametrize("changes", [{}, {"longest_side": 96}, {"augment_on": "device"}])
def test_batches_are_those_without_confidence_and_it_comes_along(
    unsure: Path, changes: dict[str, Any]
) -> None:
    with_it, without = (
        list(
            batches(prepare(config_for(unsure, confidence=one, **changes)).data.samples, 4, 0, 4, 2)
        )
        for one in (True, False)
    )
    for ours, theirs in zip(with_it, without, strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)
        assert theirs.confidence is None
        assert ours.confidence is not None
        assert ours.confidence.shape == ours.labels.shape


def test_photos_brought_to_another_size_bring_their_confidence_and_fill_the_cache(
    unsure: Path,
) -> None:
    plain = {"scale": (1, 1), "flip": 0, "colour": 0, "crop": (80, 96)}
    samples = prepare(config_for(unsure, longest_side=96, **plain)).data.samples
    room = samples._room
    found = samples.read(0).confidence
    assert isinstance(samples.dataset, DataSet)
    sure = samples.dataset.confidence(samples.index(0))
    assert found is not None
    assert np.array_equal(found, sure.repeat(2, axis=0).repeat(2, axis=1))
    assert room - samples._room == 80 * 96 * (3 + 1 + 1)
    again = samples.read(0).confidence
    assert again is not None
    assert np.array_equal(again, found)


def weights_of(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in (WEIGHTS, EXITS)]


@pytest.mark.parametrize("labels", ["nearest", "proportion"])
def test_certain_masks_make_the_run_without_confidence_and_uncertain_ones_another(
    tiny_data: Path, unsure: Path, tmp_path: Path, labels: Any
) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    write_confidence(data, lambda found: np.full_like(found, 255))
    regulation = RegulationConfig(width=8, start=0, ramp=0, labels=labels)
    for name, root in (("certain", data), ("without", data), ("unsure", unsure)):
        config = config_for(root, regulation=regulation, confidence=name != "without")
        train(config, tmp_path / name)
    assert weights_of(tmp_path / "certain") == weights_of(tmp_path / "without")
    assert weights_of(tmp_path / "unsure") != weights_of(tmp_path / "without")


@pytest.mark.parametrize("labels", ["nearest", "proportion"])
def test_pixels_of_no_confidence_make_the_run_in_which_they_are_ignored(
    tiny_data: Path, tmp_path: Path, labels: Any
) -> None:
    for name in ("holes", "ignored"):
        shutil.copytree(tiny_data, tmp_path / name)
    write_confidence(
        tmp_path / "holes", lambda found: np.where(drawn(found) < 99, 0, 255).astype(np.uint8)
    )
    for mask in (tmp_path / "ignored/labels/train").iterdir():
        found = np.asarray(Image.open(mask))
        Image.fromarray(np.where(drawn(found) < 99, 255, found).astype(np.uint8)).save(mask)
    # A weight of each kind, to see the pixels in all losses.
    regulation = RegulationConfig(width=8, start=0, ramp=0, labels=labels, srf_where="everywhere")
    for name in ("holes", "ignored"):
        config = config_for(tmp_path / name, confidence=name == "holes", regulation=regulation)
        train(config, tmp_path / f"run of {name}")
    ours, theirs = (
        [
            {key: value for key, value in record.items() if key != "images_per_s"}
            for record in read_metrics(tmp_path / f"run of {name}" / METRICS)
        ]
        for name in ("holes", "ignored")
    )
    assert ours == theirs


def test_an_interrupted_run_goes_on_bit_for_bit(
    unsure: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(unsure, accumulate=2, augment_on="device", class_weights="median-frequency")
    train(config, tmp_path / "whole")
    seen = []

    def fails(*arguments: Any) -> Any:
        seen.append(arguments)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return accumulate_gradient(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "accumulate_gradient", fails)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "stopped")
    assert (tmp_path / "stopped" / STATE).exists()
    assert train(config, tmp_path / "stopped", resume=True).finished
    assert weights_of(tmp_path / "stopped") == weights_of(tmp_path / "whole")


def test_a_run_is_resumed_with_or_without_confidence_as_it_began(
    unsure: Path, tmp_path: Path
) -> None:
    train(config_for(unsure, steps=1), tmp_path / "run")
    with pytest.raises(UserError, match="was started with confidence=True, not False"):
        train(config_for(unsure, steps=1, confidence=False), tmp_path / "run", resume=True)


def test_missing_confidence_is_refused_before_anything_is_written(
    tiny_data: Path, unsure: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(unsure, data)
    for number in (2, 5):
        (data / f"confidence/labels/train/train_{number:02d}.png").unlink()
    for root, said in (
        (data, r"confidence/labels/train/train_02\.png; 2 of 6 masks have no confidence"),
        (tiny_data, r"confidence/labels/train/train_00\.png; 6 of 6 masks have no confidence"),
    ):
        with pytest.raises(UserError, match=said):
            train(config_for(root), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_confidence_of_another_size_ends_a_run_by_its_name(
    unsure: Path, tmp_path: Path, workers: int
) -> None:
    data = tmp_path / "data"
    shutil.copytree(unsure, data)
    Image.new("L", (40, 48)).save(data / "confidence/labels/train/train_03.png")
    with pytest.raises(UserError, match=r"train/train_03\.png: the map is 40x48, its photo"):
        train(config_for(data, workers=workers), tmp_path / "run")


def test_a_batch_keeps_its_confidence_on_its_way() -> None:
    images = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    labels, sure = torch.arange(32, dtype=torch.uint8).reshape(2, 1, 4, 4)
    here = Batch(images, labels, 8, None, sure).to(CPU)
    assert here.position == 8
    assert here.looks is None
    assert here.confidence is not None
    assert torch.equal(here.confidence, sure)


def test_a_data_set_with_confidence_is_read_as_one_without(tiny_data: Path, unsure: Path) -> None:
    ours, theirs = (open_dataset(root, "train") for root in (unsure, tiny_data))
    for index in range(len(theirs)):
        for mine, other in zip(ours.read(index), theirs.read(index), strict=True):
            assert np.array_equal(mine, other)
