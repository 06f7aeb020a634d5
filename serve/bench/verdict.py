"""From latencies to verdicts: ratios by round, their intervals, and two one-sided tests.

The unit of all inference is the *round*: fresh sessions of every artifact, warmed up and timed in
turn. What the sessions share (a machine that drifts, other processes, runs that resemble their
neighbours) cancels within a round; what they don't (where their memory lies, which kernels a
builder chose) is drawn anew in each. So a round's log ratio holds every source of variance once,
and rounds are as good as independent, which single runs are not.

No run is left out. A round's ratio is taken by medians, so that a few slow runs can't decide it;
the quantiles that are reported beside it are of all runs.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

from srdeploy.metrics import Interval
from srdeploy.serve.bench.results import LatencyOutcome, LatencyVerdict, Quantiles

Floats = npt.NDArray[np.float64]

ALPHA = 0.05
"""Error allowed to each claim: EQUIVALENT where it is not, DIFFERENT where it is not."""
POWER = 0.9
"""Chance of an answer that planning aims at."""
FLOOR_LIMIT = 2.0
"""A noise floor above this many margins: nothing can be called EQUIVALENT on such a machine."""
MOST_ROUNDS_NEEDED = 10_000
"""Nobody runs more rounds than this: the ratio can't be shown."""
RESAMPLES = 1000


def round_log_ratio(baselines: Sequence[Floats], other: Floats) -> float:
    """log(other / baseline) of one round; each float [blocks, 2], a session's two runs per block.

    The median of all differences between runs of the same block, so that a drift cancels and no
    slow run spoils more than its own pairs. Against each baseline session by itself, for the median
    of a difference of two like things is zero however skewed their noise is; against their mean it
    would not be.
    """
    logs = np.log(other)[:, :, None]
    return float(np.mean([np.median(logs - np.log(base)[:, None, :]) for base in baselines]))


def ratio_interval(log_ratios: Sequence[float], confidence: float = 0.95) -> Interval:
    """Ratio with the t interval of the mean of its logarithms, of rounds [n >= 2]."""
    values = np.asarray(log_ratios)
    low, high = _log_interval(values, confidence)
    return Interval(value=math.exp(values.mean()), low=math.exp(low), high=math.exp(high))


def noise_floor(log_ratios: Sequence[float]) -> float:
    """The smallest margin at which two sessions of one file would be called EQUIVALENT."""
    low, high = _log_interval(np.asarray(log_ratios), 1 - 2 * ALPHA)
    return math.exp(max(abs(low), abs(high))) - 1


def judge(log_ratios: Sequence[float], floor: Sequence[float], margin: float) -> LatencyVerdict:
    """The verdict on log ratios of rounds [n], beside those of the first artifact to itself [n].

    Tested against `margin`, or against the noise floor where that is larger; with a floor of more
    than FLOOR_LIMIT margins, nothing is called EQUIVALENT, for that would say too little.
    """
    values = np.asarray(log_ratios)
    least = noise_floor(floor)
    tested = max(margin, least)
    edge = math.log1p(tested)
    p_equivalent = max(_one_sided(values, edge, "less"), _one_sided(values, -edge, "greater"))
    p_different = min(_one_sided(values, edge, "greater"), _one_sided(values, -edge, "less"))
    too_noisy = least > FLOOR_LIMIT * margin
    if p_different < ALPHA:
        outcome = LatencyOutcome.DIFFERENT
    elif p_equivalent < ALPHA and not too_noisy:
        outcome = LatencyOutcome.EQUIVALENT
    else:
        outcome = LatencyOutcome.NOT_SHOWN
    needed = None
    if outcome is LatencyOutcome.NOT_SHOWN:
        low, high = _log_interval(values, 1 - 2 * ALPHA)
        distance = 0.0 if low <= 0 <= high else float(abs(values.mean()))
        # The floor shrinks with more rounds too: the margin asked for is what counts then.
        needed = rounds_needed(float(values.std(ddof=1)), distance, margin)
        noise = rounds_needed(float(np.std(floor, ddof=1)), 0.0, margin)
        needed = None if needed is None or noise is None else max(needed, noise)
        if needed is not None and needed <= len(values):
            needed = len(values) + 1  # bad luck: the chance was POWER, not certainty
    return LatencyVerdict(
        outcome=outcome,
        margin=tested,
        p_equivalent=p_equivalent,
        p_different=p_different,
        rounds_needed=needed,
        reason=_reason(outcome, values, tested, margin, too_noisy, needed),
    )


def rounds_needed(deviation: float, distance: float, margin: float) -> int | None:
    """Rounds after which an answer comes with probability POWER; None where that is too many.

    deviation: of a round's log ratio. distance: |log ratio| as it is thought to be; below the
    margin the answer is EQUIVALENT, above it DIFFERENT.
    """
    if power(deviation, distance, margin, MOST_ROUNDS_NEEDED) < POWER:
        return None
    low, high = 2, MOST_ROUNDS_NEEDED
    while low < high:
        middle = (low + high) // 2
        if power(deviation, distance, margin, middle) < POWER:
            low = middle + 1
        else:
            high = middle
    return low


def power(deviation: float, distance: float, margin: float, rounds: int) -> float:
    """Chance of an answer after so many rounds; the rest as in rounds_needed.

    By the t distribution shifted, which is close enough to plan by.
    """
    edge = math.log1p(margin)
    error = deviation / math.sqrt(rounds)
    if error == 0:
        return float(distance != edge)
    spread = stats.t(rounds - 1)
    critical = spread.ppf(1 - ALPHA)
    if distance > edge:
        return float(spread.cdf((distance - edge) / error - critical))
    near = spread.cdf((edge - distance) / error - critical)
    far = spread.cdf((edge + distance) / error - critical)
    return float(near + far - 1)


def enough(log_ratios: Sequence[float], margin: float) -> bool:
    """Whether these rounds would show equality with probability POWER, judged only by spread.

    Deciding to stop must not look at the ratio itself: to go on until it happens to look equal
    would be wrong more often than ALPHA says.
    """
    values = np.asarray(log_ratios)
    return power(float(values.std(ddof=1)), 0.0, margin, len(values)) >= POWER


def plainly_different(log_ratios: Sequence[float], margin: float) -> bool:
    """Whether the ratio lies so far beyond the margin that more rounds can't change the verdict.

    So strict (one in ten thousand) that asking after every round costs nothing of ALPHA's.
    """
    values = np.asarray(log_ratios)
    edge = 2 * math.log1p(margin)
    if abs(values.mean()) <= edge:
        return False
    return min(_one_sided(values, edge, "greater"), _one_sided(values, -edge, "less")) < 1e-4


def quantiles(rounds: Sequence[Sequence[float]]) -> Quantiles:
    """Median, p90, p95 and p99 of all runs [rounds, runs], with intervals by the bootstrap.

    Whole rounds are drawn: runs of one round resemble each other, and drawing them one by one
    would make the intervals too narrow.
    """
    times = np.asarray(rounds, np.float64)
    shares = (50, 90, 95, 99)

    def statistic(drawn: npt.NDArray[np.intp], axis: int) -> Floats:
        chosen = times[drawn]
        return np.asarray(
            np.percentile(chosen.reshape(*chosen.shape[:-2], -1), shares, axis=-1), np.float64
        )

    found: Floats = np.asarray(np.percentile(times, shares), np.float64)
    low, high = found, found
    if len(times) > 1 and np.ptp(times) > 0:
        interval = stats.bootstrap(
            (np.arange(len(times)),),
            statistic,
            vectorized=True,
            n_resamples=RESAMPLES,
            batch=max(1, 2_000_000 // times.size),
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
        low, high = np.asarray(interval.low), np.asarray(interval.high)
    median, p90, p95, p99 = (
        Interval(value=float(value), low=float(lower), high=float(upper))
        for value, lower, upper in zip(found, low, high, strict=True)
    )
    return Quantiles(median=median, p90=p90, p95=p95, p99=p99)


def _log_interval(values: Floats, confidence: float) -> tuple[float, float]:
    if np.ptp(values) == 0:  # scipy's tests would divide by a deviation of 0
        return float(values[0]), float(values[0])
    interval = stats.ttest_1samp(values, 0.0).confidence_interval(confidence)
    return float(interval.low), float(interval.high)


def _one_sided(values: Floats, edge: float, side: Literal["less", "greater"]) -> float:
    """p value of the mean's lying on `side` of `edge`."""
    if np.ptp(values) == 0:
        return 0.0 if (values[0] < edge if side == "less" else values[0] > edge) else 1.0
    return float(stats.ttest_1samp(values, edge, alternative=side).pvalue)


def _reason(
    outcome: LatencyOutcome,
    values: Floats,
    tested: float,
    margin: float,
    too_noisy: bool,
    needed: int | None,
) -> str:
    low, high = (math.exp(end) for end in _log_interval(values, 1 - 2 * ALPHA))
    between = f"between {low:.4f} and {high:.4f}"
    raised = "" if tested == margin else f", the noise floor ({100 * margin:g} % was asked for)"
    if outcome is LatencyOutcome.EQUIVALENT:
        return f"the ratio lies {between}, within {100 * tested:.2g} %{raised}"
    if outcome is LatencyOutcome.DIFFERENT:
        return f"the ratio lies {between}, beyond {100 * tested:.2g} %{raised}"
    if too_noisy:
        text = f"two sessions of the same file may differ by {100 * tested:.2g} %"
    else:
        text = f"the ratio may lie anywhere {between}, and {100 * tested:.2g} % is the margin"
    if needed is None:
        return f"{text}; no practical number of rounds would tell"
    return f"{text}; about {needed} rounds would tell, {len(values)} were run"
