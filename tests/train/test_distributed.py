"""Two processes that torchrun starts against one: the same run, and one line where one fails."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from srdeploy.errors import UserError
from srdeploy.metrics import Score
from srdeploy.runs import METRICS, STATE, load_network, open_run
from srdeploy.spec import Spec
from srdeploy.train.checkpoint import read_state
from srdeploy.train.config import TrainConfig, load_config
from srdeploy.train.distributed import ALONE, RunningStatistics, World, found_world
from srdeploy.train.loader import batches
from srdeploy.train.loop import train
from srdeploy.train.recorder import read_metrics
from srdeploy.train.start import prepare

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {
    "network": {"name": "unet", "options": {"width": 4}},
    "regulation": {"width": 8},
    "batch": 4,
    "steps": 10,
    "crop": "32x40",
    "lr": 0.05,
    "warm_up": 2,
    "log_every": 3,
    "val_every": 5,
    "workers": 1,
    "device": "cpu",
}
PLAIN = """
from torch import nn

def make(classes):
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, classes, 1))
"""
"""A network without BatchNorm: how its batches are split makes no difference."""
FAILS = """
import errno, os, runpy, sys
from srdeploy.errors import UserError
from srdeploy.train import checkpoint, loader

def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "state.pt")

def unreadable(samples, position):
    if position >= 12:
        raise UserError("photo.png: cut short")
    return read(samples, position)

read = loader.Samples.read
what, rank = sys.argv.pop(1), os.environ["RANK"]
if what == "disk" and rank == "0":
    checkpoint.torch.save = full
if what == "photo" and rank == "1":
    loader.Samples.read = unreadable
runpy.run_module("srdeploy", run_name="__main__")
"""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As the subprocesses."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config_for(data: Path, **changes: Any) -> TrainConfig:
    return load_config({**SMALL, "data": data, **changes})


def start_two(config: TrainConfig, folder: Path, *program: str) -> subprocess.Popen[str]:
    """`srdeploy train` on two processes, or another program with its arguments."""
    folder.parent.mkdir(exist_ok=True)
    file = folder.with_suffix(".yaml")
    file.write_text(config.to_yaml())
    path = [str(ROOT), str(folder.parent), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", *(program or ("-m", "srdeploy"))),
            *("train", "--config", str(file), "--out", str(folder)),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def errors_of(process: subprocess.Popen[str]) -> list[str]:
    """Our lines of error, once the job has ended badly."""
    _, text = process.communicate(timeout=120)
    assert process.returncode != 0
    return [line for line in text.splitlines() if line.startswith("error:")]


def with_confidence(data: Path, root: Path) -> Path:
    """A copy of the tiny set in which each mask's confidence falls from left to right, and from
    mask to mask."""
    shutil.copytree(data, root)
    (root / "confidence/labels/train").mkdir(parents=True)
    for number, mask in enumerate(sorted((root / "labels/train").iterdir()), start=1):
        with Image.open(mask) as file:
            width, height = file.size
        slope = np.tile(np.linspace(255, 0, width) / number, (height, 1))
        path = root / "confidence" / mask.relative_to(root)
        Image.fromarray(slope.astype(np.uint8)).save(path)
    return root


def close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("unsure", [False, True], ids=["plain", "with confidence"])
def test_two_processes_make_the_run_of_one_with_two_micro_batches(
    tiny_data: Path, tmp_path: Path, unsure: bool
) -> None:
    data = with_confidence(tiny_data, tmp_path / "data") if unsure else tiny_data
    two = start_two(config_for(data, confidence=unsure), tmp_path / "two")
    train(config_for(data, confidence=unsure, batch=2, accumulate=2), tmp_path / "one")
    _, said = two.communicate(timeout=120)
    assert two.returncode == 0, said
    assert said.count("step 3/10:") == 1, "one process speaks"
    assert "Warning" not in said
    ours, theirs = (read_state(tmp_path / name / STATE) for name in ("two", "one"))
    # Weights, and running statistics with their counts.
    close(ours["network"], theirs["network"])
    close(ours["exits"], theirs["exits"])
    for mine, other in zip(
        read_metrics(tmp_path / "two" / METRICS),
        read_metrics(tmp_path / "one" / METRICS),
        strict=True,
    ):
        assert mine["step"] == other["step"]
        if mine["kind"] == "train":
            assert mine["terms"] == pytest.approx(other["terms"], rel=1e-4)
        else:
            assert mine["miou"] == pytest.approx(other["miou"], abs=0.01)
    run = open_run(tmp_path / "two")
    assert type(load_network(run)) is type(prepare(config_for(tiny_data)).regulated.network)


def test_a_killed_process_ends_the_job_with_one_line_and_one_process_goes_on(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plain_of_two.py").write_text(PLAIN)
    monkeypatch.syspath_prepend(tmp_path)
    config = config_for(
        tiny_data,
        network={"name": "plain_of_two:make"},
        regulation={"enabled": False},
        steps=200,
        val_every=100,
        save_every=5,
    )
    job = start_two(config, tmp_path / "killed")
    wait_for_step(job, tmp_path / "killed" / METRICS, 12)
    os.kill(process_of(job.pid, rank=1), signal.SIGKILL)
    assert errors_of(job) == [
        "error: rank 1 of 2 ended without a word (killed, or its machine is gone): start all "
        "processes again with --resume"
    ]
    assert 10 <= read_state(tmp_path / "killed" / STATE)["step"] < 200
    assert train(config, tmp_path / "killed", resume=True).finished
    train(config, tmp_path / "whole")
    ours, theirs = (read_state(tmp_path / name / STATE) for name in ("killed", "whole"))
    close(ours["network"], theirs["network"])


@pytest.mark.parametrize(
    ("what", "said"),
    [("photo", "error: rank 1 of 2: photo.png: cut short"), ("disk", "error: rank 0 of 2: ")],
)
def test_an_error_on_one_process_ends_the_job_with_its_line_alone(
    tiny_data: Path, tmp_path: Path, what: str, said: str
) -> None:
    program = tmp_path / "fails.py"
    program.write_text(FAILS)
    (line,) = errors_of(start_two(config_for(tiny_data), tmp_path / "run", str(program), what))
    assert line.startswith(said)
    if what == "disk":
        assert "state.pt" in line
        assert "space" in line


def wait_for_step(job: subprocess.Popen[str], path: Path, step: int) -> None:
    """Until a record of `step` or later is on the disk."""
    end = time.monotonic() + 120
    while time.monotonic() < end and job.poll() is None:
        lines = path.read_text().splitlines()[:-1] if path.exists() else []
        if lines and json.loads(lines[-1])["step"] >= step:
            return
        time.sleep(0.01)
    pytest.fail(f"the run never came to step {step}: {job.communicate()[1]}")


def process_of(launcher: int, rank: int) -> int:
    """The id of a launcher's process of a rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in children:
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"no process of rank {rank} among {children}")


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_of_samples_is_dealt_out_without_gap_or_repetition(
    tiny_data: Path, workers: int
) -> None:
    samples = prepare(config_for(tiny_data)).data.samples
    whole = list(batches(samples, 4, 1, 4, workers))
    parts = [list(batches(samples, 4, 1, 4, workers, World(rank, 2))) for rank in range(2)]
    for one, *halves in zip(whole, *parts, strict=True):
        assert torch.equal(one.images, torch.cat([half.images for half in halves]))
        assert torch.equal(one.labels, torch.cat([half.labels for half in halves]))


def test_counts_of_parts_add_up_to_those_of_the_whole() -> None:
    spec = Spec(classes=("field", "box"), palette=((0, 0, 0), (9, 9, 9)))
    rng = np.random.default_rng(0)
    whole = Score(spec)
    total = np.zeros_like(whole.counts())
    for _ in range(3):
        truth, found = (rng.integers(0, 2, (40, 40)).astype(np.uint8) for _ in range(2))
        truth[:20] = 1
        part = Score(spec)
        for score in (whole, part):
            score.update(truth, found)
        total += part.counts()
    together = Score(spec)
    together.set_counts(total)
    assert together.result() == whole.result()
    assert np.array_equal(together.tallies(), whole.tallies())


def test_a_batch_that_cannot_be_dealt_out_is_refused(tiny_data: Path) -> None:
    assert World(1, 4).share(12) == 3
    with pytest.raises(UserError, match="batch 4 can't be dealt out to 3 processes evenly"):
        prepare(config_for(tiny_data), world=World(0, 3))


def test_synchronised_batch_norm_is_refused_on_the_cpu(tiny_data: Path) -> None:
    with pytest.raises(UserError, match="sync_batch_norm needs GPUs"):
        prepare(config_for(tiny_data, sync_batch_norm=True))


def test_a_batch_norm_without_momentum_is_refused_by_name() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=None))
    RunningStatistics(network, ALONE)
    with pytest.raises(UserError, match="'1' is a BatchNorm with momentum=None"):
        RunningStatistics(network, World(0, 2))


def test_only_a_whole_environment_of_torchrun_makes_several_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert found_world() == ALONE
    for name, value in {
        "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert found_world() == World(1, 4, 1)
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(UserError, match="are to be numbers"):
        found_world()


def test_the_ranks_random_numbers_differ_and_follow_from_the_step() -> None:
    drawn = []
    for rank, step in ((1, 5), (2, 5), (1, 6), (1, 5)):
        World(rank, 4).seed(0, step)
        drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[3]
    assert len(set(drawn)) == 3
    before = torch.get_rng_state()
    World(0, 4).seed(0, 5)
    assert torch.equal(before, torch.get_rng_state()), "the leader's go on"
