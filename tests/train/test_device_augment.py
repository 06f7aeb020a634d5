"""Mirroring and colours as tensors against those of the threads that read."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from srdeploy.runs import METRICS, NetworkConfig
from srdeploy.train.augment import Augmentation, augment
from srdeploy.train.config import TrainConfig
from srdeploy.train.loader import batches, collate
from srdeploy.train.loop import train
from srdeploy.train.recorder import read_metrics
from srdeploy.train.start import prepare

CPU = torch.device("cpu")


@given(
    sizes=st.lists(st.tuples(st.integers(20, 90), st.integers(20, 90)), min_size=1, max_size=3),
    colour=st.sampled_from([0.0, 0.25, 0.9]),
    flip=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_both_halves_together_equal_the_threads_augmentation(
    sizes: list[tuple[int, int]], colour: float, flip: float, seed: int
) -> None:
    how = Augmentation((32, 48), (0.5, 2.0), flip, colour, (124, 116, 104), 255)
    rng = np.random.default_rng(seed)
    scenes = []
    for height, width in sizes:
        small = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        photo = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        labels = rng.integers(0, 7, (height, width), dtype=np.uint8)
        scenes.append((np.asarray(photo), labels))
    ours, theirs = (
        collate(
            [
                augment(*scene, each, np.random.default_rng([seed, number]))
                for number, scene in enumerate(scenes)
            ],
            0,
        )
        for each in (replace(how, on_device=True), how)
    )
    assert ours.looks is not None
    assert theirs.looks is None
    here = ours.to(CPU)
    assert here.looks is None
    assert torch.equal(here.labels, theirs.labels)
    # Pillow rounds its matrix product in its own way.
    assert (here.images.int() - theirs.images.int()).abs().max() <= 1


def config_for(data: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(
        data=data,
        network=NetworkConfig(name="unet", options={"width": 4}),
        **{"batch": 2, "steps": 4, "crop": (32, 40), "log_every": 1, "workers": 1, **changes},
        device="cpu",
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_takes_its_batches_from_where_the_key_says(tiny_data: Path, workers: int) -> None:
    for where, left in (("threads", False), ("device", True)):
        samples = prepare(config_for(tiny_data, augment_on=where)).data.samples
        for batch in batches(samples, 2, 0, 3, workers):
            assert (batch.looks is not None) is left


def test_a_run_with_augmentation_on_the_device_learns_as_the_other(
    tiny_data: Path, tmp_path: Path
) -> None:
    losses = []
    for where in ("threads", "device"):
        train(config_for(tiny_data, augment_on=where), tmp_path / where)
        records = read_metrics(tmp_path / where / METRICS)
        losses.append([one["loss"] for one in records if one["kind"] == "train"])
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
