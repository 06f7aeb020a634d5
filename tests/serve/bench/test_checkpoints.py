"""An export's run is known by the hash of its weights."""

import shutil
from pathlib import Path

import pytest

from srdeploy.errors import UserError
from srdeploy.files import sha256_of, write_json
from srdeploy.serve.bench.entries import find_checkpoints


@pytest.fixture
def deploy(tmp_path: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A deploy folder whose manifest names runs/narrow, seen from the current folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run_folder, "runs/narrow")
    folder = tmp_path / "deploy" / "narrow"
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"graph")
    write_json(
        folder / "manifest.json",
        {
            "command": "srdeploy export runs/narrow --out deploy/narrow",
            "weights_sha256": sha256_of(run_folder / "network.safetensors"),
        },
    )
    return folder


def test_the_exports_own_command_leads_to_its_run(deploy: Path) -> None:
    assert find_checkpoints([deploy]) == [Path("runs/narrow")]
    assert find_checkpoints([deploy / "model.onnx"]) == [Path("runs/narrow")]


def test_a_run_of_that_name_with_other_weights_does_not_count(deploy: Path) -> None:
    Path("runs/narrow/network.safetensors").write_bytes(b"trained on")
    assert find_checkpoints([deploy]) == [None]


def test_a_run_that_moved_is_found_where_it_is_given(deploy: Path) -> None:
    shutil.move("runs/narrow", "elsewhere")
    assert find_checkpoints([deploy]) == [None]
    assert find_checkpoints([deploy], [Path("elsewhere")]) == [Path("elsewhere")]


def test_a_run_that_belongs_to_no_artifact_is_refused(deploy: Path) -> None:
    shutil.copytree("runs/narrow", "other")
    Path("other/network.safetensors").write_bytes(b"of another training")
    with pytest.raises(UserError, match="--checkpoint other: none of the artifacts"):
        find_checkpoints([deploy], [Path("other")])
    with pytest.raises(UserError, match="is not a run folder"):
        find_checkpoints([deploy], [deploy])


def test_runs_and_files_of_others_have_no_checkpoint(deploy: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.onnx"
    foreign.write_bytes(b"graph")
    assert find_checkpoints([Path("runs/narrow"), foreign]) == [None, None]
