"""A benchmark's report with synthetic latencies: a CPU and a GPU, three artifacts, all outcomes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from srdeploy.metrics import Interval, Scores
from srdeploy.serve.bench.results import (
    AccuracyResult,
    AccuracyRow,
    BenchReport,
    Cell,
    CheckpointMatch,
    Footprint,
    Latency,
    LatencyOutcome,
    LatencyVerdict,
    MachineReport,
    Quantiles,
    Row,
)

ROUNDS, RUNS = 12, 24
CLASSES = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "person")
REASONS = {
    LatencyOutcome.EQUIVALENT: "the ratio lies between 0.9982 and 1.0044, within 1 %",
    LatencyOutcome.DIFFERENT: "the ratio lies between 1.0279 and 1.0371, beyond 1.25 %, the noise "
    "floor (1 % was asked for)",
    LatencyOutcome.NOT_SHOWN: "the ratio may lie anywhere between 0.9991 and 1.0223, and 1.25 % is "
    "the margin; about 31 rounds would tell, 12 were run",
}
Factory = Callable[..., BenchReport]


def around(value: float, spread: float) -> Interval:
    return Interval(value=value, low=value * (1 - spread), high=value * (1 + spread))


def by_round(mean: Interval, seed: int) -> tuple[float, ...]:
    """Ratios whose spread fits the interval."""
    spread = (mean.high - mean.low) / 4 * ROUNDS**0.5
    return tuple(np.random.default_rng(seed).normal(mean.value, spread, ROUNDS).tolist())


def timing(
    typical: float, seed: int, ratio: Interval | None = None, outcome: LatencyOutcome | None = None
) -> Latency:
    """Latencies near `typical` ms with drift and a heavy tail, like a shared machine's."""
    rng = np.random.default_rng(seed)
    drift = 1 + 0.01 * np.sin(np.arange(ROUNDS))[:, None]
    tail = (
        1 + 0.004 * rng.standard_t(3, (ROUNDS, RUNS)).clip(-2) + rng.pareto(5, (ROUNDS, RUNS)) / 9
    )
    rounds = typical * drift * tail
    spans = (around(float(q), 0.004) for q in np.quantile(rounds, (0.5, 0.9, 0.95, 0.99)))
    verdict = None
    if outcome is not None:
        verdict = LatencyVerdict(
            outcome=outcome,
            margin=0.01 if outcome is LatencyOutcome.EQUIVALENT else 0.0125,
            p_equivalent=0.0007 if outcome is LatencyOutcome.EQUIVALENT else 0.31,
            p_different=0.004 if outcome is LatencyOutcome.DIFFERENT else 0.62,
            rounds_needed=31 if outcome is LatencyOutcome.NOT_SHOWN else None,
            reason=REASONS[outcome],
        )
    return Latency(
        quantiles=Quantiles(**dict(zip(("median", "p90", "p95", "p99"), spans, strict=True))),
        ratio=ratio,
        verdict=verdict,
        round_ratios=() if ratio is None else by_round(ratio, seed),
        rounds_ms=tuple(tuple(float(run) for run in one) for one in rounds),
    )


def row(name: str, end_to_end: Latency, device_time: Latency | None = None, **other: Any) -> Row:
    gpu = device_time is not None
    values: dict[str, Any] = {
        "name": name,
        "path": f"deploy/{name}",
        "backend": "tensorrt" if gpu else "onnxruntime",
        "device": "cuda:0" if gpu else "cpu",
        "precision": "fp16" if gpu else "float32",
        "images_per_s": 1000 / end_to_end.quantiles.median.value,
        "settled": True,
        "file_bytes": 18_300_000,
        "parameters": 4_521_337,
        "gmacs": 8.19,
        "footprint": Footprint(
            import_s=0.21,
            first_inference_s=0.43,
            own_mib=212.0,
            peak_mib=341.0,
            device_mib=604.0 if gpu else None,
        ),
    }
    return Row(end_to_end=end_to_end, device_time=device_time, **{**values, **other})


def cpu_cell(names: tuple[str, str, str], **other: Any) -> Cell:
    baseline, regulated, left_in = names
    rows = (
        row(baseline, timing(44.7, 1)),
        row(regulated, timing(44.8, 2, around(1.0013, 0.003), LatencyOutcome.EQUIVALENT)),
        row(
            left_in,
            timing(55.9, 3, around(1.2511, 0.004)),
            file_bytes=24_900_000,
            parameters=6_182_009,
            gmacs=10.41,
            settled=False,
        ),
    )
    values: dict[str, Any] = {
        "runtime": "onnxruntime",
        "precision": None,
        "batch": 1,
        "size": (360, 480),
        "rows": rows,
        "floor": around(1.0004, 0.0035),
        "floor_rounds": by_round(around(1.0004, 0.0035), 10),
        "device_floor": None,
        "margin": 0.01,
        "rounds": ROUNDS,
        "blocks": RUNS // 2,
        "seconds": 71.0,
        "stopped": "the spread of the rounds is small enough for 1 %",
    }
    return Cell(**{**values, **other})


def gpu_cell(names: tuple[str, str, str]) -> Cell:
    baseline, regulated, left_in = names
    rows = (
        row(baseline, timing(6.31, 4), timing(4.02, 5)),
        row(
            regulated,
            timing(6.38, 6, around(1.0107, 0.012), LatencyOutcome.NOT_SHOWN),
            timing(4.15, 7, around(1.0325, 0.004), LatencyOutcome.DIFFERENT),
        ),
        row(
            left_in,
            timing(7.41, 8, around(1.1743, 0.01)),
            timing(5.08, 9, around(1.2637, 0.004)),
            gmacs=None,
            footprint=None,
        ),
    )
    return cpu_cell(names).model_copy(
        update={
            "runtime": "tensorrt",
            "precision": "fp16",
            "batch": 8,
            "rows": rows,
            "device_floor": around(1.0001, 0.002),
            "device_floor_rounds": by_round(around(1.0001, 0.002), 11),
            "stopped": "the budget of 180 s",
        }
    )


def scores(gain: float, classes: tuple[str, ...]) -> Scores:
    rng = np.random.default_rng(0)
    iou: dict[str, float | None] = {
        name: float(rng.uniform(0.3, 0.95) + gain * rng.uniform(-1, 3)) for name in classes
    }
    iou[classes[-1]] = None
    known = [value for value in iou.values() if value is not None]
    return Scores(
        miou=sum(known) / len(known),
        pixel_accuracy=0.91,
        iou=iou,
        failure1=0.42,
        failure1_per_class=dict.fromkeys(classes, 0.42),
        failure2=0.03,
        failure2_per_class=dict.fromkeys(classes, 0.03),
        small_components=dict.fromkeys(classes, 20),
        large_components=dict.fromkeys(classes, 9),
        images=101,
    )


def accuracy(names: tuple[str, str, str], classes: tuple[str, ...]) -> AccuracyResult:
    gains = {
        "miou": Interval(value=0.0123, low=0.0051, high=0.0198),
        "failure1": Interval(value=-0.031, low=-0.052, high=-0.011),
    }
    matched = CheckpointMatch(
        checkpoint="runs/regulated", agreement=0.999987, miou_difference=1e-6, passed=True
    )
    lost = matched.model_copy(
        update={"checkpoint": "runs/baseline", "agreement": 0.97, "passed": False}
    )
    return AccuracyResult(
        data="data/camvid",
        split="test",
        images=101,
        rows=(
            AccuracyRow(
                name=names[0],
                scores=scores(0.0, classes),
                checkpoint=lost,
                gains=None,
                agreement=None,
            ),
            AccuracyRow(
                name=names[1],
                scores=scores(0.0123, classes),
                checkpoint=matched,
                gains=gains,
                agreement=0.9731,
            ),
        ),
        most_different=("0016E5_07959", "0016E5_07961"),
    )


@pytest.fixture(scope="session")
def make_report() -> Factory:
    """Makes a report; names: of baseline, regulated, and that with its exits left in."""

    def make(
        names: tuple[str, str, str] = ("baseline", "regulated", "exits left in"),
        classes: tuple[str, ...] = CLASSES,
        **other: Any,
    ) -> BenchReport:
        values: dict[str, Any] = {
            "made": "2026-01-02T03:04:05Z",
            "command": "srdeploy bench deploy/baseline deploy/regulated --data data/camvid "
            "--runtime onnxruntime,tensorrt --batch 1,8 --report report.html",
            "environment": {"srdeploy": "0.5.0", "onnxruntime": "1.24.1", "CPU": "Example 9000"},
            "threads": 2,
            "cells": (cpu_cell(names), gpu_cell(names)),
            "accuracy": accuracy(names, classes),
            "machine": MachineReport(
                figures={
                    "CPU governor": "powersave",
                    "CPU time of other processes": "3.1 %",
                    "CPU time stolen by the host": "2.1 %",
                },
                warnings=(
                    "the CPU's governor is powersave, which changes its clock: set performance",
                ),
            ),
        }
        return BenchReport(**{**values, **other})

    return make


@pytest.fixture(scope="session")
def bench_report(make_report: Factory) -> BenchReport:
    return make_report()
