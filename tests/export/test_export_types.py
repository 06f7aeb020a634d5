"""Other precisions, engines and hand-over formats, from a run through the command line."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from srdeploy.artifacts.artifact import read_sidecar
from srdeploy.cli.main import main
from srdeploy.files import sha256_of
from srdeploy.imaging import Pixels
from srdeploy.runtimes.registry import open_runtime

Make = Callable[[Path], Path]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of `srdeploy ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["srdeploy", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def certificate_of(folder: Path) -> dict[str, dict[str, Any]]:
    content = json.loads((folder / "certificate.json").read_text())
    return {line["name"]: line for line in content["lines"]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, make_run: Make) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "night")


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory, photos: list[Pixels]) -> Path:
    folder = tmp_path_factory.mktemp("calibration")
    for index in range(8):
        picture = np.roll(photos[index % 2], 5 * index, axis=1)
        Image.fromarray(picture).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def half(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in fp16, with an engine built ahead of time and a Triton repository."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is absent: NO engine was built")
    out = tmp_path_factory.mktemp("half") / "deploy"
    with pytest.MonkeyPatch.context() as patch:
        words = ["export", run, "--out", out, "--precision", "fp16", "--triton", out.parent / "t"]
        code = call(
            patch, *words, "--trt", "--builder", "rtx", "--sm", "8.9", "--set", "max_batch=3"
        )
    assert code == 0
    return out


def test_a_16_bit_graph_is_certified_and_runs(run: Path, half: Path, photos: list[Pixels]) -> None:
    lines = certificate_of(half)
    for name in ("identity", "oracles", "survivors", "parity", "types", "verification"):
        assert lines[name]["passed"] is True, lines[name]["detail"]
    kinds = {t.data_type for t in onnx.load(half / "model.onnx").graph.initializer if t.dims}
    assert onnx.TensorProto.FLOAT16 in kinds
    images = np.stack(photos)
    with open_runtime(run) as torch, open_runtime(half) as deployed:
        assert (torch.run(images) == deployed.run(images)).mean() > 0.98


def test_the_manifest_names_precision_files_and_the_command_that_makes_them(half: Path) -> None:
    manifest = json.loads((half / "manifest.json").read_text())
    assert manifest["precision"] == "fp16"
    for option in ("--precision fp16", "--trt", "--builder rtx", "--sm 8.9", "--set max_batch=3"):
        assert option in manifest["command"]
    names = {path.name for path in half.iterdir()} - {"manifest.json"}
    assert names == set(manifest["files"])
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == sha256_of(half / name)


def test_the_engine_says_what_was_built_and_that_it_was_not_run(half: Path) -> None:
    sidecar = read_sidecar(half / "model.sm89.engine")
    assert sidecar.precision == "fp16"
    assert sidecar.compute_capabilities == ("8.9",)
    assert sidecar.profiles[0].largest == (3, 64, 80)
    assert sidecar.onnx_sha256 == sha256_of(half / "model.onnx")
    lines = certificate_of(half)
    assert lines["engine"]["passed"] is True
    assert lines["engine verification"]["passed"] is None
    assert "NOT run" in lines["engine verification"]["detail"]


def test_the_triton_repository_holds_the_engine_or_the_graph(half: Path) -> None:
    model = half.parent / "t" / "deploy"
    assert (model / "config.pbtxt").is_file()
    assert [path.suffix for path in (model / "1").iterdir()] in ([".plan"], [".onnx"])


def test_int8_is_calibrated_on_the_photos_that_are_given(
    run: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "deploy"
    words = ["--precision", "int8", "--set", "quantise_ends=true"]
    words += ["--set", f"calibration={calibration}"]
    assert call(monkeypatch, "export", run, "--out", out, *words) in (0, 1)
    lines = certificate_of(out)
    assert lines["types"]["passed"] is True
    assert lines["types"]["figures"]["weight_tensors"]["int8"] > 0
    assert json.loads((out / "manifest.json").read_text())["target"] == "cpu"


def test_tf32_is_an_engines_matter_and_its_graph_stays_float32(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is absent: NO engine was built")
    out = tmp_path / "deploy"
    words = ["--precision", "tf32", "--trt", "--builder", "rtx", "--sm", "8.9"]
    assert call(monkeypatch, "export", run, "--out", out, *words) == 0
    assert "types" not in certificate_of(out)
    assert read_sidecar(out / "model.sm89.engine").figures["tf32_allowed"] is True


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--precision tf32", "add --trt"),
        ("--set target=cpu", "--precision int8"),
        ("--precision int8 --set target=cpu --trt --builder rtx --sm 8.9", "target=tensorrt"),
        ("--precision int8", "--set calibration="),
        ("--precision fp16 --keep nothing/such", "--keep nothing/such"),
        ("--sm 8.9", "add --trt"),
        ("--set refittable=true", "add --trt"),
        ("--trt --builder rtx --sm 9.0", "8.9"),
        ("--trt --set profile=1x32", "1x32"),
        ("--trt --sm 8.9", "--builder rtx"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line_before_anything_is_written(
    words: str,
    reason: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "deploy"
    assert call(monkeypatch, "export", run, "--out", out, *words.split()) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert reason in told.err
    assert len(told.err.strip().splitlines()) == 1
    assert not out.exists()


def test_without_a_gpu_the_graph_is_written_and_the_error_says_so(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from srdeploy.errors import UserError
    from srdeploy.runtimes.gpus import list_gpus

    try:
        if list_gpus():
            pytest.skip("this machine has a GPU: what happens without one was NOT tested")
    except UserError:
        pass
    out = tmp_path / "deploy"
    assert call(monkeypatch, "export", run, "--out", out, "--trt") == 2
    told = capsys.readouterr().err
    assert "--builder rtx --sm 8.9" in told
    assert str(out / "model.onnx") in told
    assert certificate_of(out)["identity"]["passed"] is True


def test_certify_refit_compares_engines_of_both(
    half: Path,
    tiny_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = onnx.load(str(tiny_file))
    for tensor in model.graph.initializer:
        if tensor.name.endswith("weight"):
            values = onnx.numpy_helper.to_array(tensor) * np.float32(1.25)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    other = tmp_path / "other.onnx"
    onnx.save(model, str(other))
    words = ["--refit", "--builder", "rtx", "--sm", "8.9", "--json"]
    assert call(monkeypatch, "certify", tiny_file, other, *words) == 0
    lines = {line["name"]: line for line in json.loads(capsys.readouterr().out)["lines"]}
    assert lines["refit"]["passed"] is True
    assert "no refit was run" in lines["refit"]["detail"]
    assert call(monkeypatch, "certify", tiny_file, other, "--sm", "8.9") == 2
    assert "--refit" in capsys.readouterr().err
