"""A run that is killed at any point goes on, and ends with the bits of one that nobody touched."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from srdeploy.errors import UserError
from srdeploy.train.run_folder import remove_torn, require_new

ROOT = Path(__file__).parents[2]


def test_ten_kills_change_nothing(tiny_data: Path, tmp_path: Path) -> None:
    report = tmp_path / "kills.json"
    script = ROOT / "benchmarks" / "train_kills.py"
    found = subprocess.run(
        [sys.executable, script, tiny_data, "--kills", "10", "--steps", "36", "--out", report],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    result = json.loads(report.read_text())
    assert result["finished"]
    assert result["same_weights"]
    assert result["same_records"]
    assert result["left_over"] == []
    struck = [kill for kill in result["kills"] if kill["status"] == -signal.SIGKILL]
    # The last may come too late for a run that is nearly through.
    assert len(struck) >= 8
    assert {kill["way"] for kill in struck} >= {"half a checkpoint", "before a file appears"}
    assert max(kill["step"] for kill in struck) > 0


def test_what_a_killed_write_leaves_is_removed_and_nothing_else(tmp_path: Path) -> None:
    torn = tmp_path / ".state.pt.abc123.part.pt"
    torn.write_bytes(b"half")
    require_new(tmp_path, force=False)
    for name in (".hidden", "notes.part"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match="is not a run"):
        require_new(tmp_path, force=False)
    remove_torn(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "notes.part"]
