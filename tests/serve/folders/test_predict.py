"""Folder prediction in this process: what is written, what is skipped, what goes on and what a
failure leaves behind."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from srdeploy.errors import UserError
from srdeploy.imaging import Pixels, read_labels, read_photo
from srdeploy.runtimes.registry import open_runtime
from srdeploy.serve.evaluate import predict_labels
from srdeploy.serve.folders import worker as worker_module
from srdeploy.serve.folders.paths import printable
from srdeploy.serve.folders.predict import LocalExecutor, predict_photos
from srdeploy.serve.folders.settings import PredictSettings
from srdeploy.serve.folders.summary import MOST_WARNED
from srdeploy.serve.folders.worker import FEW, WINDOW, FileTask
from srdeploy.serve.scheduling.planner import ModelSource, open_sessions
from srdeploy.spec import InputPolicy, Spec

MakeGraph = Callable[..., Path]
KEPT = {"classes.json", "legend.png", "manifest.jsonl"}


def save_photo(path: Path, height: int = 40, width: int = 48, seed: int = 0) -> Path:
    """A lossless photo of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def expected_mask(path: Path) -> Pixels:
    """What the colour graph says of a photo: the strongest of green, red, blue."""
    return np.asarray(read_photo(path)[..., [1, 0, 2]].argmax(-1), np.uint8)


def names_below(folder: Path) -> set[str]:
    """Relative paths of all files but those that every output folder has."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found >= KEPT
    return found - KEPT


def records(folder: Path) -> list[dict[str, Any]]:
    """The manifest without its header."""
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()[1:]]


def run(graph: Path, photos: Path | list[Path], out: Path, **more: Any) -> Any:
    """predict_photos, of an ONNX file."""
    sources = [str(one) for one in (photos if isinstance(photos, list) else [photos])]
    return predict_photos(ModelSource("colour", graph), sources, str(out), **more)


def test_masks_hold_the_class_ids_at_the_photos_own_sizes(
    make_graph: MakeGraph, tmp_path: Path
) -> None:
    photos = [
        save_photo(tmp_path / "in" / name, 33 + index, 50 - index, index)
        for index, name in enumerate(["a.png", "deep/er/b.tif", "deep/c.d.bmp"])
    ]
    out = tmp_path / "out"
    summary = run(make_graph(), tmp_path / "in", out)
    for photo, mask in zip(photos, ["a.png", "deep/er/b.png", "deep/c.d.png"], strict=True):
        assert (read_labels(out / mask) == expected_mask(photo)).all()
    assert (summary.images, summary.skipped, summary.left) == (3, (), 0)
    assert summary.images_per_s == pytest.approx(3 / summary.seconds, rel=0.05)
    assert names_below(out) == {"a.png", "deep/er/b.png", "deep/c.d.png"}


def test_the_network_sees_the_fitted_photo_and_the_mask_has_the_photos_size(
    make_graph: MakeGraph, tmp_path: Path, tiny_spec: Spec
) -> None:
    policy = InputPolicy(longest_side=40, smallest=(32, 32), usual=(40, 40), largest=(40, 40))
    graph = make_graph(spec=tiny_spec.model_copy(update={"input": policy}), size=(1, 32, 40))
    photo = save_photo(tmp_path / "in" / "big.png", 160, 200)
    run(graph, tmp_path / "in", tmp_path / "out")
    with open_runtime(graph) as runtime:
        evaluated = predict_labels(runtime, read_photo(photo), photo)
    assert (read_labels(tmp_path / "out" / "big.png") == evaluated).all()


def test_everything_that_is_asked_for_is_written_in_one_pass(
    make_graph: MakeGraph, tmp_path: Path
) -> None:
    photo = save_photo(tmp_path / "in" / "sub" / "a.png", 64, 32)
    settings = PredictSettings(overlay=True, probabilities=True, rle=True, areas="jsonl")
    out = tmp_path / "out"
    run(make_graph(output="both"), tmp_path / "in", out, settings=settings)
    assert names_below(out) == {
        "sub/a.png",
        "overlays/sub/a.jpg",
        "probabilities/sub/a.npz",
        "rle/sub/a.json",
        "areas.jsonl",
    }
    assert (read_labels(out / "sub" / "a.png") == expected_mask(photo)).all()
    (record,) = records(out)
    assert set(record["outputs"]) == names_below(out) - {"areas.jsonl"}


def test_photos_that_can_not_be_used_are_skipped_with_the_reason(
    make_graph: MakeGraph, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = save_photo(tmp_path / "in" / "good.png")
    small = save_photo(tmp_path / "in" / "small.png", 31, 48)
    large = save_photo(tmp_path / "in" / "large.png", 100, 101)
    (tmp_path / "in" / "text.jpg").write_text("not a photo")
    (tmp_path / "in" / "cut.png").write_bytes(good.read_bytes()[:500])
    settings = PredictSettings(max_megapixels=0.01)
    summary = run(make_graph(), tmp_path / "in", tmp_path / "out", settings=settings)
    reasons = {Path(skip.photo).name: skip.reason for skip in summary.skipped}
    assert set(reasons) == {"small.png", "text.jpg", "cut.png", large.name}
    assert "48x31 is too small" in reasons["small.png"]
    assert "not a readable image" in reasons["text.jpg"]
    assert "0.01 are allowed" in reasons["large.png"]
    assert (summary.images, summary.skipped_count) == (1, 4)
    assert names_below(tmp_path / "out") == {"good.png"}
    assert f"skipped {small}" in capsys.readouterr().err
    listed = {Path(one["photo"]).name for one in records(tmp_path / "out") if "error" in one}
    assert listed == set(reasons)


def test_a_photo_that_the_fixed_shape_refuses_is_skipped(
    make_graph: MakeGraph, tmp_path: Path
) -> None:
    save_photo(tmp_path / "in" / "fits.png", 40, 48)
    save_photo(tmp_path / "in" / "odd.png", 40, 50)
    summary = run(make_graph(size=(1, 40, 48)), tmp_path / "in", tmp_path / "out")
    assert [Path(skip.photo).name for skip in summary.skipped] == ["odd.png"]
    assert "not [1, 40, 50, 3]" in summary.skipped[0].reason
    assert summary.images == 1


def test_many_skipped_photos_are_told_of_once_and_all_listed(
    make_graph: MakeGraph, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    for index in range(MOST_WARNED + 5):
        (tmp_path / "in" / f"{index}.jpg").write_text("no photo")
    summary = run(make_graph(), tmp_path / "in", tmp_path / "out")
    assert summary.skipped_count == len(records(tmp_path / "out")) == MOST_WARNED + 5
    assert capsys.readouterr().err.count("warning: ") == MOST_WARNED + 1


def test_a_second_run_does_only_what_is_left_or_has_changed(
    make_graph: MakeGraph, tmp_path: Path
) -> None:
    for index in range(4):
        save_photo(tmp_path / "in" / f"{index}.png", seed=index)
    graph, out = make_graph(), tmp_path / "out"
    assert run(graph, tmp_path / "in", out).images == 4
    os.utime(out / "0.png", ns=(1, 1))
    (out / "1.png").unlink()
    save_photo(tmp_path / "in" / "2.png", 50, 50, 7)
    summary = run(graph, tmp_path / "in", out)
    assert (summary.images, summary.done_before, summary.left) == (2, 2, 0)
    assert (out / "0.png").stat().st_mtime_ns == 1
    assert read_labels(out / "2.png").shape == (50, 50)
    assert run(graph, tmp_path / "in", out, force=True).images == 4
    assert (out / "0.png").stat().st_mtime_ns != 1


def test_what_the_artifact_can_not_give_is_refused_before_anything_is_written(
    make_graph: MakeGraph, tmp_path: Path
) -> None:
    save_photo(tmp_path / "in" / "a.png")
    for settings in (PredictSettings(probabilities=True), PredictSettings(flip=True)):
        with pytest.raises(UserError, match="--output both"):
            run(make_graph(), tmp_path / "in", tmp_path / "out", settings=settings)
    assert not (tmp_path / "out").exists()


def test_tiles_take_photos_at_their_own_size(
    make_graph: MakeGraph, tmp_path: Path, tiny_spec: Spec
) -> None:
    policy = InputPolicy(longest_side=64, smallest=(32, 32), usual=(64, 64), largest=(64, 64))
    graph = make_graph(spec=tiny_spec.model_copy(update={"input": policy}))
    photo = save_photo(tmp_path / "in" / "large.png", 200, 300)
    settings = PredictSettings(tile=(64, 64), overlap=16)
    run(graph, tmp_path / "in", tmp_path / "out", settings=settings)
    assert (read_labels(tmp_path / "out" / "large.png") == expected_mask(photo)).all()


def test_decoding_runs_ahead_by_a_bounded_number_of_photos(
    make_graph: MakeGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory must not grow with the folder: decoded minus written photos stay bounded."""
    for index in range(30):
        save_photo(tmp_path / "in" / f"{index:02d}.png", 32, 32)
    lock = threading.Lock()
    alive = most = 0
    prepare, finish = FileTask.prepare, FileTask.finish

    def counted_prepare(task: FileTask) -> Pixels:
        nonlocal alive, most
        with lock:
            alive += 1
            most = max(most, alive)
        return prepare(task)

    def counted_finish(task: FileTask, labels: Pixels) -> Any:
        nonlocal alive
        found = finish(task, labels)
        with lock:
            alive -= 1
        return found

    monkeypatch.setattr(FileTask, "prepare", counted_prepare)
    monkeypatch.setattr(FileTask, "finish", counted_finish)
    monkeypatch.setattr(worker_module, "usable_cores", lambda: 1)
    run(make_graph(), tmp_path / "in", tmp_path / "out")
    assert alive == 0
    assert most <= WINDOW


def test_many_photos_are_shared_by_sessions_and_come_out_the_same(
    make_graph: MakeGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "usable_cores", lambda: 3)
    for index in range(3 * FEW):
        save_photo(tmp_path / "in" / f"{index:02d}.png", 32 + index % 3, 40, index)
    (tmp_path / "in" / "bad.jpg").write_text("not a photo")
    opened: list[int] = []

    def noted(source: ModelSource, layout: Any, wrap: Any) -> Any:
        opened.append(layout.sessions)
        return open_sessions(source, layout, wrap)

    monkeypatch.setattr(worker_module, "open_sessions", noted)
    summary = run(make_graph(), tmp_path / "in", tmp_path / "out")
    assert opened == [3]
    assert (summary.images, summary.skipped_count, summary.sessions) == (3 * FEW, 1, 3)
    for index in range(3 * FEW):
        mask = read_labels(tmp_path / "out" / f"{index:02d}.png")
        assert (mask == expected_mask(tmp_path / "in" / f"{index:02d}.png")).all()


def test_batches_of_equal_sizes_give_the_same_masks(make_graph: MakeGraph, tmp_path: Path) -> None:
    for index in range(24):
        save_photo(tmp_path / "in" / f"{index:02d}.png", 32 + index % 3, 40, index)
    graph = make_graph()
    summary = run(graph, tmp_path / "in", tmp_path / "out", executor=LocalExecutor(batch=4))
    assert summary.batch == 4
    for photo in (tmp_path / "in").iterdir():
        assert (read_labels(tmp_path / "out" / photo.name) == expected_mask(photo)).all()


def start(
    graph: Path, photos: Path, out: Path, *words: str, limit: int = 0
) -> subprocess.Popen[str]:
    """The verb in a process of its own; limit: of a file's size, in bytes."""
    command = ["predict", str(graph), str(photos), "--out", str(out), *words]
    code = (
        f"import resource, sys; limit = {limit}; "
        "limit and resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)); "
        f"sys.argv[1:] = {command!r}; from srdeploy.cli.main import main; main()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_disk_that_fills_up_leaves_nothing_half_written(
    make_graph: MakeGraph, tmp_path: Path
) -> None:
    """The file-size limit strikes inside write(), as a full disk does."""
    save_photo(tmp_path / "in" / "a.png", 32, 32)
    save_photo(tmp_path / "in" / "b.png", 300, 300)
    graph, out = make_graph(), tmp_path / "out"
    process = start(graph, tmp_path / "in", out, limit=9000)
    _, err = process.communicate()
    assert process.returncode == 2
    assert err.count("\n") == 1
    assert f"error: {out / 'b.png'} is larger than" in err
    assert "(1 photos are done" in err
    assert names_below(out) == {"a.png"}
    assert (read_labels(out / "a.png") == expected_mask(tmp_path / "in" / "a.png")).all()
    summary = run(graph, tmp_path / "in", out)
    assert (summary.images, summary.done_before) == (1, 1)


@pytest.fixture
def busy(make_graph: MakeGraph, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A graph that takes its time, 60 photos, and the output folder."""
    for index in range(60):
        save_photo(tmp_path / "in" / f"{index:02d}.png", 32, 32, index)
    return make_graph(work=400), tmp_path / "in", tmp_path / "out"


def wait_for_masks(out: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Until so many are there, and the process is still at work."""
    while len(list(out.glob("*.png"))) < count + 1:  # and the legend
        assert process.poll() is None, process.communicate()


@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_finishes_what_is_under_way_and_the_next_run_goes_on(
    busy: tuple[Path, Path, Path], blow: signal.Signals
) -> None:
    graph, photos, out = busy
    process = start(graph, photos, out, "--json")
    wait_for_masks(out, 3, process)
    process.send_signal(blow)
    told, err = process.communicate()
    summary = json.loads(told)
    assert process.returncode == 130, err
    assert summary["left"] > 0
    assert summary["images"] + summary["left"] == 60
    assert len(names_below(out)) == len(records(out)) == summary["images"]
    assert run(graph, photos, out).done_before == summary["images"]
    for photo in photos.iterdir():
        assert (read_labels(out / photo.name) == expected_mask(photo)).all()


def test_a_second_ctrl_c_ends_it_at_once_without_a_traceback(
    busy: tuple[Path, Path, Path],
) -> None:
    graph, photos, out = busy
    process = start(graph, photos, out)
    wait_for_masks(out, 3, process)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert "once more to stop at once" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode != 0
    assert "Traceback" not in err
    run(graph, photos, out)
    assert names_below(out) == {photo.name for photo in photos.iterdir()}


def test_names_are_shown_on_one_line() -> None:
    assert printable("a\nb\x1b[0m\udcff é 名") == "a\\nb\\x1b[0m\\udcff é 名"
