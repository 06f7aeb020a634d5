"""Ratios by round, the two one-sided tests, planning, and quantiles."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from srdeploy.serve.bench.results import LatencyOutcome
from srdeploy.serve.bench.verdict import (
    enough,
    judge,
    noise_floor,
    plainly_different,
    power,
    quantiles,
    ratio_interval,
    round_log_ratio,
    rounds_needed,
)


def rounds(ratio: float, deviation: float, count: int, seed: int = 0) -> list[float]:
    """Log ratios with exactly this mean and deviation."""
    values = np.random.default_rng(seed).normal(size=count)
    values = (values - values.mean()) / values.std(ddof=1)
    return [float(one) for one in math.log(ratio) + deviation * values]


@given(factor=st.floats(0.25, 4), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_an_exact_factor_is_found_whatever_the_machine_does(factor: float, seed: int) -> None:
    machine = np.random.default_rng(seed).uniform(1, 100, (7, 2))
    assert round_log_ratio([machine, machine], factor * machine) == pytest.approx(math.log(factor))


@given(seed=st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_slow_runs_of_a_few_blocks_do_not_move_a_rounds_ratio(seed: int) -> None:
    rng = np.random.default_rng(seed)
    base = rng.uniform(9, 11, (11, 2))
    other = base * rng.uniform(0.99, 1.01, (11, 1))
    held_up = other.copy()
    held_up[:4] *= 50
    assert abs(round_log_ratio([base], held_up) - round_log_ratio([base], other)) < 0.1


def test_skewed_noise_alike_on_both_sides_gives_no_ratio() -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(400):
        first, twin, other = np.exp(rng.exponential(0.3, (3, 5, 2)))
        found.append(round_log_ratio([first, twin], other))
    assert stats.ttest_1samp(found, 0).pvalue > 0.01


def test_the_interval_of_the_ratio_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        interval = ratio_interval(list(math.log(1.02) + rng.normal(0, 0.02, 12)))
        covered += interval.low <= 1.02 <= interval.high
    assert 0.92 <= covered / 400 <= 0.98


def test_the_floor_is_the_margin_at_which_a_file_would_equal_itself() -> None:
    values = rounds(1.002, 0.01, 20)
    floor = noise_floor(values)
    for margin, passes in ((1.01 * floor, True), (0.99 * floor, False)):
        edge = math.log1p(margin)
        p = max(
            stats.ttest_1samp(values, edge, alternative="less").pvalue,
            stats.ttest_1samp(values, -edge, alternative="greater").pvalue,
        )
        assert bool(p < 0.05) is passes


@pytest.mark.parametrize(
    ("ratio", "outcome"),
    [
        (1.0, LatencyOutcome.EQUIVALENT),
        (1.005, LatencyOutcome.EQUIVALENT),
        (1.0099, LatencyOutcome.NOT_SHOWN),
        (1.02, LatencyOutcome.DIFFERENT),
        (0.98, LatencyOutcome.DIFFERENT),
    ],
)
def test_the_verdict_follows_the_ratio_where_noise_is_small(
    ratio: float, outcome: LatencyOutcome
) -> None:
    verdict = judge(rounds(ratio, 0.003, 20), rounds(1.0, 0.003, 20, seed=1), 0.01)
    assert verdict.outcome is outcome
    assert verdict.margin == 0.01
    assert verdict.reason


def test_a_margin_below_the_floor_is_raised_to_it_and_says_so() -> None:
    floor = rounds(1.0, 0.03, 20)
    verdict = judge(rounds(1.0, 0.003, 20), floor, 0.01)
    assert verdict.outcome is LatencyOutcome.EQUIVALENT
    assert verdict.margin == noise_floor(floor) > 0.01
    assert "noise floor" in verdict.reason


def test_nothing_is_equivalent_on_a_machine_whose_floor_is_twice_the_margin() -> None:
    verdict = judge(rounds(1.0, 0.003, 20), rounds(1.0, 0.08, 20), 0.01)
    assert verdict.outcome is LatencyOutcome.NOT_SHOWN
    assert verdict.p_equivalent < 0.05
    assert verdict.rounds_needed is not None
    assert verdict.rounds_needed > 20


def test_a_difference_is_shown_although_the_machine_is_noisy() -> None:
    verdict = judge(rounds(2.0, 0.1, 10), rounds(1.0, 0.1, 10), 0.01)
    assert verdict.outcome is LatencyOutcome.DIFFERENT


def test_rounds_without_any_spread_are_judged_too() -> None:
    assert judge([0.0] * 5, [0.0] * 5, 0.01).outcome is LatencyOutcome.EQUIVALENT
    assert judge([0.5] * 5, [0.0] * 5, 0.01).outcome is LatencyOutcome.DIFFERENT


def test_not_shown_names_more_rounds_than_were_run() -> None:
    verdict = judge(rounds(1.0, 0.02, 10), rounds(1.0, 0.02, 10, seed=1), 0.01)
    assert verdict.outcome is LatencyOutcome.NOT_SHOWN
    assert verdict.rounds_needed is not None
    assert verdict.rounds_needed > 10
    assert str(verdict.rounds_needed) in verdict.reason


def test_a_ratio_on_the_margin_itself_is_not_to_be_shown() -> None:
    assert rounds_needed(0.02, math.log1p(0.01), 0.01) is None
    assert rounds_needed(10.0, 0.0, 0.01) is None


@given(deviation=st.floats(0.002, 0.03), distance=st.sampled_from([0.0, 0.003, 0.02]))
@settings(deadline=None, max_examples=20)
def test_the_planned_rounds_are_the_fewest_with_that_power(
    deviation: float, distance: float
) -> None:
    needed = rounds_needed(deviation, distance, 0.01)
    assert needed is not None
    assert power(deviation, distance, 0.01, needed) >= 0.9
    assert needed == 2 or power(deviation, distance, 0.01, needed - 1) < 0.9


def test_the_planned_power_is_what_simulated_benchmarks_have() -> None:
    rng = np.random.default_rng(0)
    count = rounds_needed(0.02, 0.0, 0.01)
    assert count is not None
    edge = math.log1p(0.01)
    shown = 0
    for _ in range(400):
        values = rng.normal(0, 0.02, count)
        shown += bool(
            stats.ttest_1samp(values, edge, alternative="less").pvalue < 0.05
            and stats.ttest_1samp(values, -edge, alternative="greater").pvalue < 0.05
        )
    assert 0.85 <= shown / 400 <= 0.95


def test_stopping_looks_at_the_spread_and_not_at_the_ratio() -> None:
    for ratio in (1.0, 1.01, 1.5):
        assert enough(rounds(ratio, 0.01, 20), 0.01)
        assert not enough(rounds(ratio, 0.03, 20), 0.01)


def test_only_what_is_far_beyond_the_margin_is_plainly_different() -> None:
    assert plainly_different(rounds(1.2, 0.02, 8), 0.01)
    assert plainly_different(rounds(0.8, 0.02, 8), 0.01)
    assert not plainly_different(rounds(1.015, 0.001, 30), 0.01)
    assert not plainly_different(rounds(1.2, 0.3, 8), 0.01)


def test_quantiles_are_of_all_runs_and_lie_within_their_intervals() -> None:
    times = np.random.default_rng(0).lognormal(3, 0.2, (12, 30))
    times[3, 4] = 10_000  # not clipped away
    found = quantiles(times.tolist())
    for interval, share in zip(
        (found.median, found.p90, found.p95, found.p99), (50, 90, 95, 99), strict=True
    ):
        assert interval.value == pytest.approx(np.percentile(times, share))
        assert interval.low <= interval.value <= interval.high
    assert found.p99.high > found.p90.high


def test_intervals_of_quantiles_are_wider_where_the_runs_of_a_round_resemble_each_other() -> None:
    rng = np.random.default_rng(0)
    apart = rng.normal(100, 5, (12, 30))
    alike = rng.normal(100, 5, (12, 1)) + rng.normal(0, 0.1, (12, 30))
    widths = [
        (lambda one: one.high - one.low)(quantiles(one.tolist()).median) for one in (apart, alike)
    ]
    assert widths[1] > 2 * widths[0]


@pytest.mark.parametrize("times", [[[5.0, 5.0]], [[5.0, 6.0]], [[5.0], [5.0]]])
def test_too_little_for_a_bootstrap_gives_only_the_figures(times: list[list[float]]) -> None:
    median = quantiles(times).median
    assert median.low == median.value == median.high
