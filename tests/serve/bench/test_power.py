"""How often the verdict is right, on simulated machines: the very script that users can run."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "power.py"
BENCHES = 40
BUDGET_S = 120
"""Simulated seconds of measuring per benchmark; what --budget is by default."""


@cache
def rates(machine: str, shift: float, benches: int = BENCHES) -> dict[str, Any]:
    done = subprocess.run(
        [
            *(sys.executable, str(SCRIPT), "--machines", machine, "--shifts", str(shift)),
            *("--benches", str(benches), "--budget", str(BUDGET_S), "--json"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    (found,) = json.loads(done.stdout)["rates"][machine]
    assert isinstance(found, dict)
    return found


def test_equal_latencies_are_called_equivalent_within_the_budget() -> None:
    found = rates("shared", 0)
    assert found["EQUIVALENT"] >= 0.8
    assert found["median_seconds"] <= BUDGET_S


def test_a_shift_of_three_percent_is_hardly_ever_called_equivalent_and_mostly_found() -> None:
    found = rates("shared", 3)
    assert found["EQUIVALENT"] <= 0.05
    assert found["DIFFERENT"] >= 0.8


@pytest.mark.parametrize("shift", [0, 0.5, 1, 3])
def test_verdicts_are_hardly_ever_wrong_by_their_own_margin(shift: float) -> None:
    # 0.05 is the rate where the ratio stands right on the margin; 40 benchmarks scatter.
    assert rates("shared", shift)["wrong"] <= 0.15


def test_the_more_two_differ_the_less_often_they_are_called_equivalent() -> None:
    found = [rates("shared", shift)["EQUIVALENT"] for shift in (0, 0.5, 1, 3)]
    assert found == sorted(found, reverse=True)


def test_on_a_crowded_machine_nothing_is_claimed_rather_than_something_wrong() -> None:
    found = rates("crowded", 3, 20)
    assert found["EQUIVALENT"] <= 0.05
    assert rates("crowded", 0, 20)["NOT SHOWN"] >= 0.5


def test_a_quiet_machine_needs_few_rounds() -> None:
    found = rates("quiet", 0, 20)
    assert found["EQUIVALENT"] >= 0.9
    assert found["median_seconds"] < BUDGET_S / 2
