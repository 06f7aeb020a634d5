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
    small = ["deeplabv2-mobilenetv2", "--option", "width_mult=0.25", "--size", "32x32"]
    small += ["--classes", "3", "--rounds", "3", "--threads", "1"]
    result = run("step_cost.py", *small, "--out", str(tmp_path / "figures.json"))
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "figures.json").read_text())["deeplabv2-mobilenetv2"]
    assert found["commands"][0]["command"].startswith(
        "srdeploy bench train deeplabv2-mobilenetv2 --option="
    )
    rows = {row["name"]: row for row in found["variants"]}
    assert list(rows) == ["baseline", "mea", "lean", "authors"]
    # Heads of 3 M parameters, their gradients and momentum: 35 MiB.
    assert rows["authors"]["memory_mib"] > rows["baseline"]["memory_mib"] + 30
    (line,) = (one for one in result.stdout.splitlines() if "mobilenetv2" in one)
    assert line.startswith(f"| deeplabv2-mobilenetv2 | {rows['baseline']['median_ms']:.0f} | ")
    for name in ("mea", "lean", "authors"):
        assert f"| {rows[name]['time']['value']:.3f} (" in line
    again = run("step_cost.py", *small, "--out", str(tmp_path / "figures.json"))
    assert again.stdout == result.stdout
    assert "$ srdeploy" not in again.stderr, "what was measured is kept"


@pytest.mark.parametrize(
    "script",
    [
        "step_cost.py",
        "camvid.py",
        "verdicts.py",
        "precisions.py",
        "power.py",
        "one_convolution.py",
        "evidence.py",
    ],
)
def test_every_benchmark_says_what_it_does(script: str) -> None:
    result = run(script, "--help")
    assert result.returncode == 0
    assert "Usage" in result.stdout


@pytest.mark.parametrize(
    "words",
    [
        ("camvid.py", "{absent}", "--pretrained", "absent.safetensors"),
        ("precisions.py", "{absent}", "--data", "{absent}"),
        ("evidence.py", "{absent}"),
        ("one_convolution.py", "{absent}", "stages.0"),
    ],
)
def test_without_data_nothing_is_measured_in_silence(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    result = run(*(word.format(absent=tmp_path / "absent") for word in words))
    assert result.returncode == 1
    assert "nothing was measured" in result.stderr
