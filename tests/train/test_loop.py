"""Runs from end to end: reproducible, resumable, and refused before anything is written."""

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
from safetensors import safe_open

from srdeploy.data import open_dataset
from srdeploy.deployable import Deployable
from srdeploy.errors import UserError
from srdeploy.imaging import fit
from srdeploy.metrics import Score
from srdeploy.runs import (
    CONFIG,
    EXITS,
    METRICS,
    SAMPLES,
    SPEC,
    STATE,
    WEIGHTS,
    load_network,
    open_run,
)
from srdeploy.train.checkpoint import METADATA_KEY, read_state
from srdeploy.train.config import TrainConfig, load_config
from srdeploy.train.loop import TrainResult, train
from srdeploy.train.recorder import read_metrics
from srdeploy.train.run_folder import require_new
from srdeploy.train.start import prepare

pytestmark = pytest.mark.wheel

SMALL = {
    "network": {"name": "unet", "options": {"width": 4}},
    "regulation": {"width": 8},
    "batch": 2,
    "crop": "32x40",
    "lr": 0.05,
    "warm_up": 2,
    "log_every": 3,
    "val_every": 5,
    "workers": 1,
    "device": "cpu",
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums over threads may be taken in another order; the subprocesses use one thread too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config_for(data: Path, *settings: str, **changes: Any) -> TrainConfig:
    return load_config({**SMALL, "data": data, "steps": 10, **changes}, settings=list(settings))


def records(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what the clock decides."""
    found = read_metrics(folder / METRICS)
    return [{k: v for k, v in record.items() if k != "images_per_s"} for record in found]


def same_run(a: Path, b: Path) -> None:
    for name in (WEIGHTS, EXITS, SPEC):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    assert records(a) == records(b)


@pytest.fixture(scope="module")
def finished(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainResult]:
    """A regulated run of 10 steps."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "finished"
    return folder, train(config_for(tiny_data), folder)


def test_a_run_folder_holds_what_its_readers_expect(
    tiny_data: Path, finished: tuple[Path, TrainResult]
) -> None:
    folder, result = finished
    assert result.finished
    assert result.steps == 10
    assert {p.name for p in folder.iterdir()} >= {
        WEIGHTS, EXITS, STATE, CONFIG, SPEC, METRICS, SAMPLES, "predictions",
    }  # fmt: skip
    assert not [p for p in folder.rglob("*") if ".part" in p.name]
    run = open_run(folder)
    assert run.spec.classes == ("field", "box", "disc")
    assert run.network.options == {"width": 4}
    assert TrainConfig.model_validate(run.config).steps == 10
    dataset = open_dataset(tiny_data, "val")
    for item, sample in zip(dataset.items, run.samples, strict=True):
        assert np.array_equal(np.asarray(Image.open(sample)), np.asarray(Image.open(item.image)))


def test_the_saved_network_scores_what_the_run_says(
    tiny_data: Path, finished: tuple[Path, TrainResult]
) -> None:
    folder, result = finished
    run = open_run(folder)
    deployable = Deployable(load_network(run), run.spec).eval()
    score = Score(run.spec)
    dataset = open_dataset(tiny_data, "val")
    for index in range(len(dataset)):
        photo, labels = dataset.read(index)
        with torch.inference_mode():
            predicted = deployable(torch.from_numpy(np.array(fit(photo, run.spec)))[None])[0]
        score.update(labels, predicted.numpy())
    assert score.result().miou == result.best_miou
    with safe_open(folder / WEIGHTS, "pt") as file:
        best = json.loads(file.metadata()[METADATA_KEY])
    assert best == {"step": result.best_step, "miou": result.best_miou}


def test_records_come_at_their_intervals_with_every_term(
    finished: tuple[Path, TrainResult],
) -> None:
    found = records(finished[0])
    assert [(r["kind"], r["step"]) for r in found] == [
        ("train", 3), ("train", 5), ("val", 5), ("train", 6), ("train", 9), ("train", 10),
        ("val", 10),
    ]  # fmt: skip
    assert set(found[0]["terms"]) >= {"main", "seg", "cls"}
    # Feedback begins after a quarter of the run.
    assert set(found[-2]["terms"]) == {"main", "seg", "cls", "srf", "srl"}
    best = max(r["miou"] for r in found if r["kind"] == "val")
    assert finished[1].best_miou == best


def test_predictions_are_drawn_at_each_validation_with_the_exits_in_the_last(
    finished: tuple[Path, TrainResult],
) -> None:
    pictures = sorted((finished[0] / "predictions").iterdir())
    assert [p.name for p in pictures] == ["step-000005.png", "step-000010.png"]
    sizes = []
    for picture in pictures:
        with Image.open(picture) as file:
            sizes.append(file.size)
    # Photo, truth and prediction; then five exits more.
    assert sizes[1][0] > 2 * sizes[0][0]


def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    tiny_data: Path, tmp_path: Path, finished: tuple[Path, TrainResult]
) -> None:
    train(config_for(tiny_data, workers=0, cache_mib=0), tmp_path / "again")
    same_run(finished[0], tmp_path / "again")
    train(config_for(tiny_data, seed=1), tmp_path / "other")
    weights = [(f / WEIGHTS).read_bytes() for f in (finished[0], tmp_path / "other")]
    assert weights[0] != weights[1]


def test_regulation_changes_neither_the_start_nor_the_batches(tiny_data: Path) -> None:
    regulated = prepare(config_for(tiny_data))
    after_regulated = torch.rand(3)
    baseline = prepare(config_for(tiny_data, "regulation.enabled=false"))
    assert torch.equal(torch.rand(3), after_regulated)
    assert regulated.regulated.taps
    assert not baseline.regulated.taps
    ours, theirs = (job.regulated.network.state_dict() for job in (regulated, baseline))
    assert all(torch.equal(ours[name], theirs[name]) for name in {**ours, **theirs})
    for position in range(8):
        for a, b in zip(
            regulated.data.samples.read(position)[:2],
            baseline.data.samples.read(position)[:2],
            strict=True,
        ):
            assert np.array_equal(a, b)


def test_a_regulated_run_with_weights_of_zero_is_the_baseline_bit_for_bit(
    tiny_data: Path, tmp_path: Path
) -> None:
    zero = [f"regulation.{name}_weight=0" for name in ("seg", "cls", "srf", "srl")]
    train(config_for(tiny_data, *zero), tmp_path / "zero")
    train(config_for(tiny_data, "regulation.enabled=false"), tmp_path / "baseline")
    assert (tmp_path / "zero" / EXITS).exists()
    assert not (tmp_path / "baseline" / EXITS).exists()
    weights = [(tmp_path / name / WEIGHTS).read_bytes() for name in ("zero", "baseline")]
    assert weights[0] == weights[1]


def test_preprocessing_is_as_configured_and_kept_in_the_spec(
    tiny_data: Path,
) -> None:
    half = (0.5, 0.5, 0.5)
    settings = {"mean": half, "std": half, "colour_order": "BGR", "longest_side": 96}
    spec = prepare(config_for(tiny_data, **settings)).spec
    assert (spec.mean, spec.std, spec.colour_order) == (half, half, "BGR")
    assert spec.input.longest_side == 96
    assert spec.input.usual == (80, 96)


def test_a_network_learns_the_tiny_set(tiny_data: Path, tmp_path: Path) -> None:
    config = config_for(tiny_data, steps=60, lr=0.2, val_every=60, batch=4, scale=(0.8, 1.2))
    result = train(config, tmp_path / "run")
    assert result.best_miou is not None
    # All pixels called "field" would score 0.26.
    assert result.best_miou > 0.45


HELD = """
import sys, time
from pathlib import Path
from torch.optim.optimizer import register_optimizer_step_post_hook
from srdeploy.cli.main import main

go_on, steps = Path(sys.argv.pop(1)), iter(range(1, 1000))

def hold(*_):
    if next(steps) == 17:
        while not go_on.exists():
            time.sleep(0.01)

register_optimizer_step_post_hook(hold)
main()
"""
"""`srdeploy` that holds in step 17 until its first argument exists: the blow always comes in time,
however late this process gets its turn."""


def start_process(folder: Path, data: Path, steps: int, go_on: Path) -> subprocess.Popen[str]:
    settings = [
        *("network.options.width=4", "regulation.width=8", "warm_up=2", "log_every=3"),
        "val_every=5",
    ]
    command = [
        *(sys.executable, "-c", HELD, str(go_on), "train", str(data), "--out", str(folder)),
        *("--network", "unet", "--batch", "2", "--crop", "32x40", "--lr", "0.05"),
        *("--workers", "1", "--device", "cpu", "--steps", str(steps)),
    ]
    for setting in settings:
        command += ["--set", setting]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        command,
        env=environment,
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    """Until a record of `step` or later is on the disk."""
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        path = folder / METRICS
        lines = path.read_text().splitlines()[:-1] if path.exists() else []
        if lines and json.loads(lines[-1])["step"] >= step:
            return
        time.sleep(0.01)
    pytest.fail(f"the run never came to step {step}: {process.communicate()[1]}")


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    tiny_data: Path, tmp_path: Path, uninterrupted: Path, blow: signal.Signals
) -> None:
    folder = tmp_path / "stopped"
    go_on = tmp_path / "go-on"
    process = start_process(folder, tiny_data, steps=30, go_on=go_on)
    wait_for_step(process, folder, 12)
    process.send_signal(blow)
    go_on.touch()
    _, errors = process.communicate(timeout=120)
    reached = int(read_state(folder / STATE)["step"])
    assert 10 <= reached < 30
    if blow == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        assert reached % 5 == 0
    else:
        assert process.returncode == 1
        assert f"stopped after step {reached} of 30" in errors
        assert f"srdeploy train --out {folder} --resume" in " ".join(errors.split())
        assert "Traceback" not in errors

    result = train(config_for(tiny_data, steps=30), folder, resume=True)
    assert result.finished
    for name in (WEIGHTS, EXITS):
        assert (folder / name).read_bytes() == (uninterrupted / name).read_bytes(), name
    ours, theirs = records(folder), records(uninterrupted)
    if blow != signal.SIGKILL and ours != theirs:
        # Stopping on request leaves one more record of losses, where it stopped.
        ours, theirs = ([r for r in found if r["kind"] == "val"] for found in (ours, theirs))
    assert ours == theirs


@pytest.fixture(scope="module")
def uninterrupted(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(config_for(tiny_data, steps=30), folder)
    return folder


def test_a_run_killed_before_its_first_checkpoint_begins_anew(
    tiny_data: Path, tmp_path: Path, finished: tuple[Path, TrainResult]
) -> None:
    folder = tmp_path / "run"
    train(config_for(tiny_data), folder)
    for name in (STATE, WEIGHTS, EXITS):
        (folder / name).unlink()
    train(config_for(tiny_data), folder, resume=True)
    same_run(folder, finished[0])


def test_resuming_a_finished_run_says_so_and_changes_nothing(
    tiny_data: Path, finished: tuple[Path, TrainResult], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, before = finished
    content = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    result = train(config_for(tiny_data), folder, resume=True)
    assert "is finished already: 10 steps" in " ".join(capsys.readouterr().err.split())
    assert (result.steps, result.best_miou) == (10, before.best_miou)
    assert content == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_is_never_replaced_unasked(
    tiny_data: Path, tmp_path: Path, finished: tuple[Path, TrainResult]
) -> None:
    with pytest.raises(UserError, match="exists: --resume goes on .*--force replaces it"):
        train(config_for(tiny_data), finished[0])
    (tmp_path / "thesis.tex").write_text("years of work")
    for force in (False, True):
        with pytest.raises(UserError, match="exists and is not a run"):
            train(config_for(tiny_data), tmp_path, force=force)
    with pytest.raises(UserError, match="is a file: a run needs a folder"):
        train(config_for(tiny_data), tmp_path / "thesis.tex", force=True)


def test_a_run_that_was_killed_while_it_began_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_text("{}")
    require_new(tmp_path, force=False)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not a run"):
        require_new(tmp_path, force=False)


def test_force_replaces_the_run_and_leaves_other_peoples_files(
    tiny_data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    train(config_for(tiny_data, steps=2), folder)
    (folder / "notes.txt").write_text("mine")
    train(config_for(tiny_data, "regulation.enabled=false", steps=3), folder, force=True)
    assert not (folder / EXITS).exists()
    assert (folder / "notes.txt").read_text() == "mine"
    assert [p.name for p in (folder / "predictions").iterdir()] == ["step-000003.png"]
    assert {r["step"] for r in records(folder)} == {3}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["network.name=unett"], "unknown network 'unett': did you mean 'unet'"),
        (["network.options.widht=3"], "has no option 'widht': did you mean 'width'"),
        (["val_split=vall"], "has no split 'vall': did you mean 'val'"),
        (["device=cuda:99"], "device cuda:99 was asked for"),
        (["device=gpu"], "unknown device 'gpu'"),
        (["regulation.taps=[nowhere]"], "nowhere"),
        (["pretrained=none.safetensors"], r"none\.safetensors"),
        (["data=nowhere"], "no such data folder"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_written(
    tiny_data: Path, tmp_path: Path, settings: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        train(config_for(tiny_data, *settings), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_photo_of_val_that_is_too_small_is_named_before_anything_is_written(
    tiny_data: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    for kind in ("images", "labels"):
        path = data / kind / "val" / "val_01.png"
        with Image.open(path) as file:
            small = file.resize((20, 20))
        small.save(path)
    with pytest.raises(UserError, match=r"images/val/val_01\.png: 20x20 is too small"):
        train(config_for(data), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_folder_below_a_file_is_refused_in_one_line(tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"file/run: Not a directory"):
        train(config_for(tiny_data), tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_failed_force_leaves_the_old_run_whole(tiny_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(config_for(tiny_data, steps=2), folder)
    content = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="unknown network"):
        train(config_for(tiny_data, "network.name=unett"), folder, force=True)
    assert content == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_truncated_checkpoint_is_refused_by_its_name(tiny_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(config_for(tiny_data, steps=2), folder)
    state = folder / STATE
    state.write_bytes(state.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"state\.pt: truncated"):
        train(config_for(tiny_data, steps=2), folder, resume=True)


def test_resuming_needs_a_run_the_same_configuration_and_the_same_data(
    tiny_data: Path, tmp_path: Path, finished: tuple[Path, TrainResult]
) -> None:
    with pytest.raises(UserError, match="no such run folder"):
        train(config_for(tiny_data), tmp_path / "none", resume=True)
    with pytest.raises(UserError, match=r"was started with steps=10, not 20"):
        train(config_for(tiny_data, steps=20), finished[0], resume=True)
    with pytest.raises(UserError, match="--resume and --force exclude each other"):
        train(config_for(tiny_data), finished[0], resume=True, force=True)


def test_a_loss_that_is_not_finite_names_step_and_term(tiny_data: Path, tmp_path: Path) -> None:
    config = config_for(tiny_data, lr=1e30, warm_up=0, log_every=100, val_every=100, steps=100)
    with pytest.raises(UserError, match=r"step \d+: the loss term '\w+' is (nan|inf|-inf): lower"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run" / STATE).exists()


def test_channels_last_and_accumulation_train_too(tiny_data: Path, tmp_path: Path) -> None:
    config = config_for(
        tiny_data,
        steps=2,
        channels_last=True,
        accumulate=2,
        amp=True,
        class_weights="median-frequency",
        val_limit=1,
    )
    result = train(config, tmp_path / "run")
    assert result.finished
    assert load_network(open_run(tmp_path / "run"))
