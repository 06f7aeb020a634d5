"""Training networks of a user's own code: trained, resumed, exported, predicted with."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from srdeploy.cli.main import app
from srdeploy.data import open_dataset
from srdeploy.errors import UserError
from srdeploy.export.pipeline import export_run
from srdeploy.models.weights import read_tensors
from srdeploy.runs import STATE, load_network, load_trained, open_run
from srdeploy.runtimes.registry import open_runtime
from srdeploy.serve.evaluate import evaluate
from srdeploy.train.checkpoint import read_state, save_state
from srdeploy.train.config import TrainConfig, load_config
from srdeploy.train.loop import train

NAME = "trained_pkg.models:make_network"
CODE = """
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, width=6, aux=True, picky=16, least=1):
        super().__init__()
        self.picky, self.least = picky, least
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(4, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Conv2d(width, classes, 1)
        self.aux = nn.Conv2d(4, classes, 1) if aux else None

    def forward(self, images):
        if any(side % self.picky for side in images.shape[2:]):
            raise ValueError(f"sides must be multiples of {self.picky}")
        if min(images.shape[2:]) < self.least:
            raise ValueError("too small")
        low = self.stem(images)
        out = {"out": self.head(self.body(low))}
        if self.aux is not None:
            out["aux"] = self.aux(low)
        return out

def make_network(num_classes, **options):
    return Net(num_classes, **options)

class OneSize(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 5, 8, 8), nn.ReLU())
        self.body = nn.Sequential(nn.Linear(24, 24), nn.ReLU())
        self.head = nn.Conv2d(5, classes, 1)

    def forward(self, images):
        low = self.stem(images)
        return self.head(self.body(low.flatten(2)).reshape(low.shape))
"""


@pytest.fixture(scope="module", autouse=True)
def _package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("work")
    (folder / "trained_pkg").mkdir()
    (folder / "trained_pkg" / "models.py").write_text(CODE)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield
    for name in [name for name in sys.modules if name.startswith("trained_pkg")]:
        del sys.modules[name]
    torch.set_num_threads(threads)


def config_for(data: Path, *settings: str, network: dict[str, Any] | None = None) -> TrainConfig:
    flags = {
        **{"data": data, "network": network or {"name": NAME, "options": {"width": 5}}},
        **{"steps": 4, "batch": 2, "crop": "32x48", "multiple": 16, "workers": 0},
        **{"device": "cpu", "save_every": 2, "val_every": 4, "log_every": 1},
        **{"regulation.width": 4, "regulation.start": 0.0, "regulation.ramp": 0.0},
    }
    return load_config(None, None, flags, settings)


def save_and_die(*arguments: Any) -> None:
    save_state(*arguments)
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A regulated run of the network with its auxiliary head, by the command line."""
    out = tmp_path_factory.mktemp("runs") / "own"
    arguments = ["train", str(tiny_data), "--out", str(out), "--network", NAME, "-q"]
    arguments += ["--option", "width=5", "--steps", "4", "--batch", "2", "--crop", "32x48"]
    arguments += ["--workers", "0", "--device", "cpu", "--set", "multiple=16"]
    for setting in ("save_every=2", "val_every=4", "log_every=1", "regulation.width=4"):
        arguments += ["--set", setting]
    arguments += ["--set", "regulation.start=0.0", "--set", "regulation.ramp=0.0"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return out


def test_the_run_says_which_code_its_network_comes_from(run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["network"] == {"name": NAME, "options": {"width": 5}, "auxiliary": "keep"}
    assert open_run(run).spec.input.multiple == 16


def test_its_auxiliary_head_is_trained_along_and_not_deployed(run: Path) -> None:
    assert "aux.weight" in read_tensors(run / "network.safetensors")
    opened = open_run(run)
    assert "aux.weight" in load_trained(opened).state_dict()
    assert "aux.weight" not in load_network(opened).state_dict()
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert first["terms"]["own"] > 0


def test_a_stopped_run_goes_on_to_the_very_weights_of_one_that_was_not(
    run: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "stopped"
    config = config_for(tiny_data)
    with monkeypatch.context() as patch:
        patch.setattr("srdeploy.train.loop.save_state", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            train(config, out)
    assert read_state(out / STATE)["step"] == 2
    assert train(config, out, resume=True).steps == 4
    name = "network.safetensors"
    assert (out / name).read_bytes() == (run / name).read_bytes()


def test_what_is_exported_predicts_as_the_run_does_at_sizes_that_the_network_refuses(
    run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    result = export_run(run, tmp_path / "deploy")
    assert result.passed, result.certificate.summary()
    assert [head["name"] for head in result.manifest["auxiliary_heads_left_out"]] == ["aux"]
    dataset = open_dataset(tiny_data, "val")
    images = np.random.default_rng(0).integers(0, 256, (2, 41, 53, 3), dtype=np.uint8)
    with open_runtime(run) as ours, open_runtime(result.folder) as exported:
        assert (ours.run(images) == exported.run(images)).mean() > 0.999
        assert evaluate(ours, dataset).miou == pytest.approx(evaluate(exported, dataset).miou)


def test_stripping_trains_without_the_auxiliary_head(tiny_data: Path, tmp_path: Path) -> None:
    config = config_for(tiny_data, "network.auxiliary=strip", "steps=2")
    assert train(config, tmp_path / "run").finished
    assert "aux.weight" not in read_tensors(tmp_path / "run" / "network.safetensors")


def test_a_network_of_one_size_is_trained_and_scored_at_the_crops_size(
    tiny_data: Path, tmp_path: Path
) -> None:
    network = {"name": "trained_pkg.models:OneSize"}
    settings = ("steps=2", "fixed_size=true", "multiple=1")
    config = config_for(tiny_data, *settings, network=network)
    assert train(config, tmp_path / "run").finished
    assert open_run(tmp_path / "run").spec.input.fixed
    images = np.zeros((1, 32, 48, 3), np.uint8)
    with open_runtime(tmp_path / "run") as runtime:
        assert runtime.run(images).shape == (1, 32, 48)
        with pytest.raises(UserError, match=r"takes only images of \[N, 32, 48, 3\]"):
            runtime.run(np.zeros((1, 40, 48, 3), np.uint8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["crop=40x48"], "crop 40x48 is not divisible by multiple=16: give another --crop"),
        (["fixed_size=true", "longest_side=64"], "fixed_size and longest_side exclude each other"),
        (["network.options={classes: 3}"], "comes from the class list: leave it away"),
        (["network.auxiliary=drop"], "'network.auxiliary' is 'drop'"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused(
    tiny_data: Path, settings: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        config_for(tiny_data, *settings)


def test_a_network_that_would_fail_at_the_first_validation_is_refused_before_training(
    tiny_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"fails on an image of 63x63.*--set multiple=32") as caught:
        train(config_for(tiny_data, "multiple=1"), tmp_path / "run")
    assert "ValueError: sides must be multiples of 16" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_smallest_size_that_a_network_takes_can_be_said(
    tiny_data: Path, tmp_path: Path
) -> None:
    network = {"name": NAME, "options": {"least": 36, "picky": 1}}
    config = config_for(tiny_data, "multiple=1", "steps=1", "crop=40x48", network=network)
    with pytest.raises(UserError, match=r"fails on an image of 32x32.*--set smallest=64x64"):
        train(config, tmp_path / "run")
    settings = ("multiple=1", "steps=1", "crop=40x48", "smallest=36x36")
    assert train(config_for(tiny_data, *settings, network=network), tmp_path / "run").finished
    assert open_run(tmp_path / "run").spec.input.smallest == (36, 36)


def test_code_that_is_not_there_is_refused_before_anything_is_written(
    tiny_data: Path, tmp_path: Path
) -> None:
    config = config_for(tiny_data, "network.name=trained_pkg.models:make_netwrk")
    with pytest.raises(UserError, match="did you mean 'make_network'"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
