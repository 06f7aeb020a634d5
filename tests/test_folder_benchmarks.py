"""The benchmark of `predict` over folders: on something tiny, and what it makes of its figures."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from srdeploy.imaging import encode_mask
from srdeploy.spec import InputPolicy, Spec

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SPEC = Spec(
    classes=("red", "green", "blue"),
    palette=((200, 60, 40), (40, 160, 60), (40, 70, 200)),
    input=InputPolicy(smallest=(8, 8), usual=(40, 48), largest=(64, 64), longest_side=48),
)
SIZES = ((40, 48), (48, 40), (30, 60))
"""(height, width) of the photos; the last is fitted to 24 x 48."""


def module(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    """A module of benchmarks/."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    found: ModuleType = import_module(name)
    return found


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "folders.py"), *words],
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """A network whose label is the strongest colour."""
    kernel = np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1)
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["floats"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "kernel"], ["logits"]),
        helper.make_node("ArgMax", ["logits"], ["best"], axis=1, keepdims=0),
        helper.make_node("Cast", ["best"], ["labels"], to=TensorProto.UINT8),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", "H", "W", 3])
    labels = helper.make_tensor_value_info("labels", TensorProto.UINT8, ["N", "H", "W"])
    weights = [numpy_helper.from_array(kernel, "kernel")]
    whole = helper.make_graph(nodes, "colours", [images], [labels], weights)
    model = helper.make_model(whole, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    model.metadata_props.add(key="srdeploy.spec", value=SPEC.to_json())
    onnx.save(model, str(tmp_path / "colours.onnx"))
    return tmp_path / "colours.onnx"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """JPEGs of several sizes, one of which the network sees at another."""
    folder = tmp_path / "photos"
    folder.mkdir()
    random = np.random.default_rng(0)
    for index in range(6):
        height, width = SIZES[index % len(SIZES)]
        blocks = random.integers(0, 256, (height // 10, width // 4, 3), np.uint8)
        photo = Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)
        photo.save(folder / f"photo{index}.jpg", quality=95)
    return folder


def test_processes_that_do_every_photo_as_evaluate_would_are_compared(
    graph: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "folders.json"
    contenders = ["srdeploy", "srdeploy-anew", "dataloader"]
    words = ["--contenders", ",".join(contenders), "--rounds", "2", "--out", str(out)]
    result = run(str(graph), "--photos", str(photos), *words)
    assert result.returncode == 0, result.stderr
    found = json.loads(out.read_text())
    assert [row["contender"] for row in found["rows"]] == contenders
    assert found["photos"] == 6
    assert found["photos_decoded_otherwise_by_pillow"] == 0
    for row in found["rows"]:
        assert row["masks"] == {"same": 12, "rounded": 0, "wrong": 0, "missing": 0}
        assert row["images_per_s"][0] > 0
        assert 0 < row["ceiling"][0] < 1
        assert f"| {row['contender']} | {row['images_per_s'][0]:.1f} (" in result.stdout
    order = [cell["contender"] for cell in found["cells"]]
    assert order == [*contenders, *reversed(contenders)], "forth and back"
    assert 0 < found["ceiling"] < 1
    assert str(tmp_path) not in out.read_text()


@pytest.mark.parametrize("name", ["loop", "threads", "side-by-side"])
def test_peers_do_every_photo_as_evaluate_would(
    name: str, monkeypatch: pytest.MonkeyPatch, graph: Path, photos: Path, tmp_path: Path
) -> None:
    files = sorted(photos.glob("*.jpg"))
    expected = module(monkeypatch, "folder_masks").ExpectedMasks(graph, files, "onnxruntime", None)
    peers, plain_runtime = import_module("folder_peers"), import_module("plain_runtime")
    monkeypatch.setattr(peers, "AHEAD", 2)
    kind = peers.KINDS[name]
    sessions = plain_runtime.open_sessions(graph, kind.sessions, kind.threads)
    kind.go(peers.Codec(graph, files), sessions, tmp_path)
    assert expected.judge(tmp_path, expected.peers)["same"] == len(files)


def test_the_fraction_is_of_the_raw_rate_around_each_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = module(monkeypatch, "folders")
    monkeypatch.setattr(folders, "usable_cores", lambda: 2)
    masks = {"same": 3, "rounded": 0, "wrong": 1, "missing": 0}
    cells = [
        {"contender": name, "images_per_s": rate, "masks": masks}
        | {"raw_before": {"a": 40.0, "b": 1.0}, "raw_after": {"a": raw, "b": 1.0}}
        for name, rate, raw in (
            ("srdeploy", 36.0, 40.0),
            ("loop", 20.0, 40.0),
            ("loop", 30.0, 60.0),
            ("srdeploy", 45.0, 60.0),
        )
    ]
    costs = [{"ours": 50.0, "pillow": 50.0}, {"ours": 40.0, "pillow": 120.0}]
    ours, loop = folders.rows(cells, costs, ["srdeploy", "loop"], "a")
    assert ours["fraction"][0] == pytest.approx((36 / 40 + 45 / 50) / 2)
    assert loop["fraction"][0] == pytest.approx((20 / 40 + 30 / 50) / 2)
    assert ours["ceiling"] == pytest.approx([0.5, 0.5, 0.5])  # 2 cores / 40 = 50 ms a photo
    assert ours["of_ceiling"][0] == pytest.approx(1.8)
    assert loop["ceiling"][0] == pytest.approx((50 / 100 + 40 / 160) / 2)
    assert loop["srdeploy_over_it"][0] == pytest.approx((36 / 20 + 45 / 30) / 2)
    assert ours["srdeploy_over_it"] is None
    assert ours["masks"] == {"same": 6, "rounded": 0, "wrong": 2, "missing": 0}


def test_masks_that_differ_or_lack_are_counted(
    monkeypatch: pytest.MonkeyPatch, graph: Path, photos: Path, tmp_path: Path
) -> None:
    files = sorted(photos.glob("*.jpg"))[:4]
    expected = module(monkeypatch, "folder_masks").ExpectedMasks(graph, files, "onnxruntime", None)
    one_off = expected.ours[1].copy()
    one_off[0, 0] = (one_off[0, 0] + 1) % 3
    written = {0: expected.ours[0], 1: one_off, 2: (expected.ours[2] + 1) % 3}
    for index, labels in written.items():
        path = tmp_path / f"{files[index].stem}.png"
        path.write_bytes(encode_mask(labels, SPEC))
    found = expected.judge(tmp_path, expected.ours)
    assert found == {"same": 1, "rounded": 1, "wrong": 1, "missing": 1}


def test_a_pass_of_the_raw_runtime_runs_every_photo_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_runtime = module(monkeypatch, "plain_runtime")
    photos = [np.full((2, 2, 3), index, np.uint8) for index in range(50)]
    seen: list[int] = []

    def session(images: Any) -> Any:
        seen.append(int(images[0, 0, 0, 0]))
        return images[..., 0]

    assert plain_runtime.rate_of_pass([session, session, session], photos) > 0
    assert sorted(seen) == list(range(50))


def test_processes_stand_still_between_their_answers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "twice.py"
    # The last line is waited for: a process that ended after its answer could not be stopped.
    script.write_text("print('ready', flush=True)\nprint(2 * int(input()), flush=True)\ninput()\n")
    asked = module(monkeypatch, "asked_process").AskedProcess("twice", str(script))
    with asked:
        (child,) = (one for one in psutil.Process().children() if str(script) in one.cmdline())
        assert until(lambda: child.status() == psutil.STATUS_STOPPED)
        assert asked.ask("21") == 42
        assert until(lambda: child.status() == psutil.STATUS_STOPPED)
        with pytest.raises(SystemExit, match="twice ended: nothing was measured"):
            asked.ask("4")
    assert not child.is_running()


def until(holds: Callable[[], bool]) -> bool:
    """Whether it holds at last."""
    for _ in range(1000):
        if holds():
            return True
        time.sleep(0.01)
    return False


def test_without_photos_nothing_is_measured_in_silence() -> None:
    result = run("absent", "--photos", "absent")
    assert "nothing was measured" in result.stderr
    assert result.returncode == 1


def test_contenders_that_are_none_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = module(monkeypatch, "folders")
    assert folders.choose("loop, srdeploy,loop") == ["loop", "srdeploy"]
    with pytest.raises(SystemExit, match="unknown contenders \\['none'\\]"):
        folders.choose("loop,none")
