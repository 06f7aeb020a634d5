"""From a run to a deploy folder, through the command line."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from srdeploy.cli.main import main
from srdeploy.errors import UserError
from srdeploy.export.pipeline import export_run
from srdeploy.files import sha256_of
from srdeploy.runtimes.registry import open_runtime

Make = Callable[[Path], Path]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of `srdeploy ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["srdeploy", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, make_run: Make) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "night")


@pytest.fixture(scope="module")
def deployed(run: Path) -> Path:
    out = run.parent / "deploy"
    result = export_run(run, out)
    assert result.passed, result.certificate.summary()
    return out


def test_a_deploy_folder_holds_graph_manifest_and_certificate_that_fit_each_other(
    run: Path, deployed: Path
) -> None:
    manifest = json.loads((deployed / "manifest.json").read_text())
    certificate = json.loads((deployed / "certificate.json").read_text())
    names = {path.name for path in deployed.iterdir()}
    assert (
        names
        == {"model.onnx", "manifest.json", "certificate.json"}
        == {
            *manifest["files"],
            "manifest.json",
        }
    )
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == sha256_of(deployed / name)
    lines = {line["name"]: line for line in certificate["lines"]}
    assert list(lines) == ["identity", "oracles", "survivors", "parity", "provenance"]
    assert manifest["graph_digest"] == lines["identity"]["figures"]["digest_deployed"]
    assert manifest["weights_sha256"] == sha256_of(run / "network.safetensors")
    assert manifest["command"].startswith(f"srdeploy export {run} --out {deployed}")
    assert manifest["network"] == {"name": "tiny", "options": {"width": 5}}


def test_exporting_again_gives_the_same_folder_but_for_the_date(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    run: Path,
    deployed: Path,
) -> None:
    before = {path.name: path.read_bytes() for path in deployed.iterdir()}
    assert call(monkeypatch, "export", run, "--out", deployed, "--force", "--json") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    summary = json.loads(printed.out)
    assert summary["certificate"]["passed"] is True
    for name in ("model.onnx", "certificate.json"):
        assert (deployed / name).read_bytes() == before[name]
    old, new = json.loads(before["manifest.json"]), summary["manifest"]
    assert old.pop("made") <= new.pop("made")
    assert old == new


def test_the_deployed_graph_gives_what_the_run_gives(run: Path, deployed: Path) -> None:
    images = torch.randint(0, 256, (2, 40, 56, 3), dtype=torch.uint8).numpy()
    with open_runtime(run) as ours, open_runtime(deployed) as exported:
        agreement = (ours.run(images) == exported.run(images)).mean()
    assert agreement > 0.999


def test_certify_prints_the_lines_and_writes_the_certificate(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    tiny_file: Path,
    tiny_file_with_exit: Path,
) -> None:
    out = tmp_path / "c.json"
    assert call(monkeypatch, "certify", tiny_file, tiny_file_with_exit, "--out", out) == 1
    err = capsys.readouterr().err
    assert "✗ identity:" in err
    assert "✗ survivors:" in err
    assert "✓ oracles:" in err
    assert json.loads(out.read_text())["passed"] is False
    assert call(monkeypatch, "certify", tiny_file, tiny_file, "--json") == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True


def test_a_network_that_diverged_fails_with_exit_code_1_and_is_written_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    make_run: Make,
) -> None:
    run = make_run(tmp_path / "run")
    weights = safetensors.torch.load_file(run / "network.safetensors")
    last = next(name for name in reversed(weights) if name.endswith("bias"))
    weights[last] = torch.full_like(weights[last], torch.nan)
    safetensors.torch.save_file(weights, run / "network.safetensors")
    assert call(monkeypatch, "export", run, "--out", tmp_path / "out") == 1
    err = capsys.readouterr().err
    assert "✗ parity: NaN or infinity" in err
    assert "✓ identity:" in err
    assert (tmp_path / "out" / "model.onnx").is_file()
    assert json.loads((tmp_path / "out" / "certificate.json").read_text())["passed"] is False


def test_input_that_cannot_be_used_ends_with_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    make_run: Make,
    tiny_file: Path,
) -> None:
    text = tmp_path / "text.onnx"
    text.write_text("not a graph")
    untrained = make_run(tmp_path / "untrained")
    (untrained / "network.safetensors").unlink()
    faults = {
        "not an ONNX file": ("certify", tiny_file, text),
        "no such file": ("certify", tmp_path / "absent.onnx", tiny_file),
        "no such run folder": ("export", tmp_path / "absent"),
        "has no network.safetensors yet": ("export", untrained, "--out", tmp_path / "out"),
    }
    for expected, arguments in faults.items():
        assert call(monkeypatch, *arguments) == 2
        err = capsys.readouterr().err
        assert expected in err
        assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_only_a_deploy_folder_is_ever_replaced(tmp_path: Path, run: Path, deployed: Path) -> None:
    with pytest.raises(UserError, match="replace it with --force"):
        export_run(run, deployed)
    precious = tmp_path / "photos"
    precious.mkdir()
    (precious / "holiday.jpg").write_bytes(b"...")
    with pytest.raises(UserError, match="is no deploy folder"):
        export_run(run, precious, force=True)
    assert (precious / "holiday.jpg").exists()
