"""Runs sessions of several artifacts in turn, round after round, until the result is clear.

A round opens fresh sessions of every artifact, two of the first, in an order that rotates from
round to round, and warms them up. Its blocks run all of them forth and back (A B A' A' B A), each
block starting with another one, so that a machine that slows down or speeds up steadily treats them
alike. The two sessions of the first artifact are the A/A run: what their ratio can't tell from 1 is
the noise floor, measured under the very conditions of the comparison and not at some other time.
"""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from srdeploy import console
from srdeploy.imaging import Pixels
from srdeploy.serve.bench.verdict import enough, plainly_different, round_log_ratio
from srdeploy.validation import Settings

Floats = npt.NDArray[np.float64]

ROUND_MS = 3000
"""A round's blocks last about this long: less, and opening sessions would be most of the work. With
a small budget less all the same, so that there are rounds enough."""
FEWEST_BLOCKS = 3
MOST_BLOCKS = 40
WARM_UP_MOST = 30
"""Runs of one session after which warming up is given up."""
FASTER = 0.95
"""A run below this share of the quickest so far says that the session is still getting faster."""
QUIET_RUNS = 2
"""Runs in a row that were not faster: the session is warm."""
FIRST_WARM_UP_MS = 1000
"""The first round's sessions run at least this long: clocks and caches of the machine itself."""


class BenchPlan(Settings):
    """How long to measure, and which difference to detect."""

    margin: float = 0.01
    """The ratio counts as equal within 1 / (1 + margin) .. 1 + margin."""
    budget_s: float = 120.0
    """No round begins that would probably end after this."""
    least_rounds: int = 8
    """Fewest rounds before an early stop: the spread of fewer is not known well enough."""
    most_rounds: int = 2000

    @property
    def round_ms(self) -> float:
        """Milliseconds that a round's blocks last, about."""
        return min(ROUND_MS, 1000 * self.budget_s / self.least_rounds)


class TimedSession(Protocol):
    """What is timed: the part of a Runtime that is used here."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    def timed_run(self, images: Pixels) -> tuple[Pixels, dict[str, float] | None]:
        """Labels, and the device's own milliseconds by phase where they can be told."""
        ...


@dataclass(frozen=True)
class TimedArtifact:
    """One artifact, and how to open it."""

    name: str
    open: Callable[[int], TimedSession]
    """The number of the opening, from 0 -> a session that is not open yet. Where several builds of
    one artifact are there, the number chooses."""
    judged: bool = True
    """Whether a verdict is wanted, so that its spread decides how long to measure. Others run
    only in the first `least_rounds` rounds: time is for the verdicts."""


@dataclass
class Measurements:
    """Every run of every session, by round. Session 0 is the first artifact's, 1 its twin, then the
    other artifacts' in their order. Milliseconds."""

    end_to_end: list[Floats] = field(default_factory=list)
    """By round: float [sessions, blocks, 2]; NaN for a session that did not run in it."""
    device: list[Floats] | None = field(default_factory=list)
    """The GPU's own time of the same runs; None where a session does not report it."""
    settled: list[bool] = field(default_factory=list)
    """By session: whether it became steady while warming up, in every round."""
    blocks: int = 0
    seconds: float = 0.0
    stopped: str = ""
    _known: dict[tuple[int, bool], list[float]] = field(default_factory=dict)

    def ratios(self, session: int, device: bool = False) -> list[float]:
        """Log ratios by round of a session to the first artifact's: its twin's only to the
        first session, others' to both."""
        times = self.device if device else self.end_to_end
        assert times is not None
        baselines = (0,) if session == 1 else (0, 1)
        known = self._known.setdefault((session, device), [])
        for one in times[len(known) :]:
            if np.isnan(one[session]).any():
                break  # it ran only in the first rounds
            known.append(round_log_ratio([one[b] for b in baselines], one[session]))
        return known

    def runs(self, sessions: Sequence[int], device: bool = False) -> list[list[float]]:
        """Every run of these sessions in the order measured, by round."""
        times = self.device if device else self.end_to_end
        assert times is not None
        return [
            [
                float(ms)
                for block in range(one.shape[1])
                for ms in one[list(sessions), block].ravel()
            ]
            for one in times
            if not np.isnan(one[list(sessions)]).any()
        ]


def measure(
    artifacts: Sequence[TimedArtifact],
    images: Pixels,
    plan: BenchPlan,
    *,
    sample: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Measurements:
    """Times `artifacts` on `images` uint8 [N, H, W, 3]; the first is the baseline.

    sample: called after each round's last run, while the device is still as it was. clock: seconds.
    Measuring goes on until the spread of the rounds is small enough to show equality within the
    margin (the ratio itself is not looked at), a difference is beyond all doubt, or the budget is
    spent.
    """
    assert artifacts
    found = Measurements(settled=[True] * (len(artifacts) + 1))
    openers = [
        (artifacts[0].open, 2, 0),
        (artifacts[0].open, 2, 1),
        *((one.open, 1, 0) for one in artifacts[1:]),
    ]
    lasting = [0, 1, *(index for index, one in enumerate(artifacts[1:], 2) if one.judged)]
    start = clock()
    with console.progress("{task.fields[rounds]} rounds") as bar:
        task = bar.add_task("bench, seconds", total=round(plan.budget_s), rounds=0)
        while not found.stopped:
            number = len(found.end_to_end)
            present = [*range(len(openers))] if number < plan.least_rounds else lasting
            first = number % len(present)  # what is opened first may lie better in memory
            with ExitStack() as stack:
                sessions = {}
                for index in present[first:] + present[:first]:
                    make, step, offset = openers[index]
                    sessions[index] = stack.enter_context(make(number * step + offset))
                _round(sessions, lasting, images, plan.round_ms, found, clock)
                sample()
            found.seconds = clock() - start
            found.stopped = _why_stop(found, artifacts, plan)
            bar.update(task, completed=round(found.seconds), rounds=number + 1)
    return found


def block_order(count: int, block: int) -> list[int]:
    """Who runs when in a block: all forth and back, starting with another one in each block."""
    forth = [(block + step) % count for step in range(count)]
    return [*forth, *reversed(forth)]


def _round(
    sessions: Mapping[int, TimedSession],
    lasting: Sequence[int],
    images: Pixels,
    round_ms: float,
    found: Measurements,
    clock: Callable[[], float],
) -> None:
    """Warms fresh sessions up, by their index, times them, and adds the times to `found`. lasting:
    those that run in every round."""
    number = len(found.end_to_end)
    least = 0.0 if number else min(FIRST_WARM_UP_MS, round_ms) / len(sessions)
    quickest: dict[int, float] = {}
    for index, session in sessions.items():
        quickest[index], settled = _warm_up(session, images, least, clock)
        found.settled[index] &= settled
    if not number:
        typical = sum(2 * quickest[index] for index in lasting)
        found.blocks = int(np.clip(round(round_ms / typical), FEWEST_BLOCKS, MOST_BLOCKS))
        if typical * FEWEST_BLOCKS > 5 * ROUND_MS:
            found.blocks = 1
    shape = (len(found.settled), found.blocks, 2)
    whole, device = np.full(shape, np.nan), np.full(shape, np.nan)
    who = sorted(sessions)
    gc.disable()  # a collection would hit one of them at random
    try:
        for block in range(found.blocks):
            order = block_order(len(who), number * found.blocks + block)
            for position, chosen in enumerate(order):
                place = who[chosen], block, int(position >= len(who))
                whole[place], device[place] = _timed(sessions[who[chosen]], images, clock)
    finally:
        gc.enable()
    found.end_to_end.append(whole)
    if found.device is not None:
        found.device.append(device)
        if np.isnan(device[who]).any():
            found.device = None


def _warm_up(
    session: TimedSession, images: Pixels, least_ms: float, clock: Callable[[], float]
) -> tuple[float, bool]:
    """Runs until the times no longer fall; the quickest in milliseconds, and whether they ceased
    to."""
    quickest, quiet, spent = np.inf, 0, 0.0
    for _ in range(WARM_UP_MOST):
        took, _ = _timed(session, images, clock)
        spent += took
        quiet = 0 if took < FASTER * quickest else quiet + 1
        quickest = min(quickest, took)
        if quiet >= QUIET_RUNS and spent >= least_ms:
            return quickest, True
    return quickest, quiet >= QUIET_RUNS


def _timed(
    session: TimedSession, images: Pixels, clock: Callable[[], float]
) -> tuple[float, float]:
    """Milliseconds from images to labels in the host's memory, and of the GPU's work; NaN where
    that is not told."""
    start = clock()
    _, phases = session.timed_run(images)
    took = 1000 * (clock() - start)
    return took, np.nan if phases is None else phases["compute_ms"]


def _why_stop(found: Measurements, artifacts: Sequence[TimedArtifact], plan: BenchPlan) -> str:
    """Empty: go on."""
    rounds = len(found.end_to_end)
    if rounds < 2:
        return ""
    if rounds >= plan.least_rounds:
        measures = (False,) if found.device is None else (False, True)
        floors = [found.ratios(1, device) for device in measures]
        others = [
            found.ratios(index, device)
            for device in measures
            for index, one in enumerate(artifacts[1:], start=2)
            if one.judged
        ]
        known = all(
            enough(one, plan.margin) or plainly_different(one, plan.margin) for one in others
        )
        if known and all(enough(one, plan.margin) for one in floors):
            return f"the spread of the rounds is small enough for {100 * plan.margin:g} %"
    if rounds >= plan.most_rounds:
        return f"{plan.most_rounds} rounds, the most"
    if found.seconds * (rounds + 1) / rounds > plan.budget_s:
        return f"the budget of {plan.budget_s:g} s"
    return ""
