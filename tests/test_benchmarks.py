"""The scripts behind README's figures run, on something small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    script, *arguments = words
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments],
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_step_cost_reports_time_and_memory_of_every_variant(tmp_path: Path) -> None:
    small = ["--network", "unet", "--option", "width=2", "--size", "32", "--steps", "3"]
    out = str(tmp_path / "figures.json")
    result = run("step_cost.py", *small, "--classes", "3", "--json", "--out", out)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == json.loads((tmp_path / "figures.json").read_text())
    variants = json.loads(result.stdout)["variants"]
    assert set(variants) == {"baseline", "mea", "lean", "authors"}


@pytest.mark.parametrize(
    "script", ["step_cost.py", "camvid.py", "certify_networks.py", "precisions.py"]
)
def test_every_benchmark_says_what_it_does(script: str) -> None:
    result = run(script, "--help")
    assert result.returncode == 0
    assert "Usage" in result.stdout


def test_without_data_nothing_is_measured_in_silence(tmp_path: Path) -> None:
    absent = str(tmp_path / "absent")
    result = run("camvid.py", absent, "--pretrained", "absent.safetensors")
    assert result.returncode == 1
    assert "nothing was measured" in result.stderr
