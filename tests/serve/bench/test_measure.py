"""The order of runs, warming up, and when measuring stops; on sessions that let a clock pass."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Self

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srdeploy.imaging import Pixels
from srdeploy.runtimes.registry import open_runtime
from srdeploy.serve.bench.measure import MOST_BLOCKS, BenchPlan, TimedArtifact, block_order, measure

IMAGES = np.zeros((1, 8, 8, 3), np.uint8)
MakeGraph = Callable[..., Path]


class Clock:
    """Time, and who ran when."""

    def __init__(self, seed: int = 0) -> None:
        self.now = 0.0
        self.rng = np.random.default_rng(seed)
        self.log: list[tuple[str, int]] = []
        self.open: set[tuple[str, int]] = set()


class Fake:
    """A session of `name`, opened as its `opening`th."""

    def __init__(
        self,
        clock: Clock,
        name: str,
        opening: int,
        seconds: float,
        noise: float,
        device: float | None,
    ) -> None:
        self.clock, self.name, self.opening = clock, name, opening
        self.seconds, self.noise, self.device = seconds, noise, device

    def __enter__(self) -> Self:
        self.clock.open.add((self.name, self.opening))
        return self

    def __exit__(self, *_: object) -> None:
        self.clock.open.remove((self.name, self.opening))

    def timed_run(self, images: Pixels) -> tuple[Pixels, dict[str, float] | None]:
        assert (self.name, self.opening) in self.clock.open
        self.clock.log.append((self.name, self.opening))
        self.clock.now += self.seconds * float(np.exp(self.clock.rng.normal(0, self.noise)))
        return images, None if self.device is None else {"compute_ms": self.device}


def side(
    clock: Clock,
    name: str,
    seconds: float = 0.1,
    noise: float = 0.01,
    device: float | None = None,
    judged: bool = True,
) -> TimedArtifact:
    return TimedArtifact(
        name, lambda opening: Fake(clock, name, opening, seconds, noise, device), judged=judged
    )


@given(count=st.integers(1, 6), block=st.integers(0, 50))
def test_a_block_runs_everyone_twice_and_reads_the_same_backwards(count: int, block: int) -> None:
    order = block_order(count, block)
    assert order == order[::-1]
    assert Counter(order) == dict.fromkeys(range(count), 2)


def test_blocks_take_turns_in_who_starts() -> None:
    assert [block_order(3, block)[0] for block in range(6)] == [0, 1, 2, 0, 1, 2]


def test_every_round_has_fresh_sessions_and_two_of_the_first() -> None:
    clock = Clock()
    found = measure(
        [side(clock, "a"), side(clock, "b")], IMAGES, BenchPlan(), clock=lambda: clock.now
    )
    rounds = len(found.end_to_end)
    assert {opening for name, opening in clock.log if name == "a"} == set(range(2 * rounds))
    assert {opening for name, opening in clock.log if name == "b"} == set(range(rounds))
    assert not clock.open


def test_sessions_take_turns_in_being_opened_first() -> None:
    clock = Clock()
    opened: list[str] = []

    class Noted(Fake):
        def __enter__(self) -> Self:
            opened.append(f"{self.name}{self.opening % 2}" if self.name == "a" else self.name)
            return super().__enter__()

    sides = [
        TimedArtifact("a", lambda opening: Noted(clock, "a", opening, 0.1, 0.0, None)),
        TimedArtifact("b", lambda opening: Noted(clock, "b", opening, 0.1, 0.0, None)),
    ]
    measure(sides, IMAGES, BenchPlan(), clock=lambda: clock.now)
    assert opened[:9] == ["a0", "a1", "b", "a1", "b", "a0", "b", "a0", "a1"]


def test_every_timed_run_is_kept_in_the_order_of_the_blocks() -> None:
    clock = Clock()
    found = measure(
        [side(clock, "a"), side(clock, "b", 0.2)], IMAGES, BenchPlan(), clock=lambda: clock.now
    )
    first = found.end_to_end[0]
    assert first.shape == (3, found.blocks, 2)
    assert first[:2] == pytest.approx(100, rel=0.1)
    assert first[2] == pytest.approx(200, rel=0.1)
    runs = found.runs((0, 1))
    assert [len(one) for one in runs] == [4 * found.blocks] * len(found.end_to_end)
    assert runs[0][:4] == [*first[0, 0], *first[1, 0]]


def test_the_ratio_is_found_and_the_twins_is_one() -> None:
    clock = Clock()
    found = measure(
        [side(clock, "a"), side(clock, "b", 0.12)], IMAGES, BenchPlan(), clock=lambda: clock.now
    )
    assert np.exp(np.mean(found.ratios(2))) == pytest.approx(1.2, rel=0.02)
    assert np.exp(np.mean(found.ratios(1))) == pytest.approx(1.0, rel=0.02)


def test_measuring_stops_when_the_spread_is_small_enough() -> None:
    clock = Clock()
    plan = BenchPlan(budget_s=1e6)
    calm = measure(
        [side(clock, "a", noise=0.003), side(clock, "b", noise=0.003)],
        IMAGES,
        plan,
        clock=lambda: clock.now,
    )
    assert len(calm.end_to_end) == plan.least_rounds
    assert "small enough" in calm.stopped
    wild = measure(
        [side(clock, "a", noise=0.03), side(clock, "b", noise=0.03)],
        IMAGES,
        plan,
        clock=lambda: clock.now,
    )
    assert len(wild.end_to_end) > plan.least_rounds
    assert "small enough" in wild.stopped


def test_a_row_without_verdict_does_not_prolong_the_measuring() -> None:
    clock = Clock()
    found = measure(
        [side(clock, "a", noise=0.003), side(clock, "b", noise=2.0, judged=False)],
        IMAGES,
        BenchPlan(budget_s=1e6),
        clock=lambda: clock.now,
    )
    assert len(found.end_to_end) == BenchPlan().least_rounds


def test_a_row_without_verdict_runs_only_in_the_first_rounds() -> None:
    clock = Clock()
    sides = [
        side(clock, "a", noise=0.03),
        side(clock, "b", 0.2, judged=False),
        side(clock, "c", noise=0.03),
    ]
    found = measure(sides, IMAGES, BenchPlan(budget_s=1e6), clock=lambda: clock.now)
    rounds, least = len(found.end_to_end), BenchPlan().least_rounds
    assert rounds > least
    assert {opening for name, opening in clock.log if name == "b"} == set(range(least))
    assert len(found.ratios(2)) == len(found.runs((2,))) == least
    assert len(found.ratios(3)) == len(found.ratios(1)) == len(found.runs((0, 1))) == rounds
    assert np.exp(np.mean(found.ratios(2))) == pytest.approx(2, rel=0.05)


def test_the_budget_is_kept_and_named() -> None:
    clock = Clock()
    found = measure(
        [side(clock, "a", noise=0.5), side(clock, "b", noise=0.5)],
        IMAGES,
        BenchPlan(budget_s=30),
        clock=lambda: clock.now,
    )
    assert "30 s" in found.stopped
    assert found.seconds < 30 * 1.2


def test_two_rounds_are_run_whatever_the_budget() -> None:
    clock = Clock()
    found = measure(
        [side(clock, "a", 50.0)], IMAGES, BenchPlan(budget_s=1), clock=lambda: clock.now
    )
    assert len(found.end_to_end) == 2
    assert found.blocks == 1  # a run of a minute: more blocks would take an hour


def test_quick_artifacts_get_many_blocks_per_round() -> None:
    clock = Clock()
    found = measure([side(clock, "a", 0.001)], IMAGES, BenchPlan(), clock=lambda: clock.now)
    assert found.blocks == MOST_BLOCKS


def test_a_small_budget_has_rounds_enough_all_the_same() -> None:
    clock = Clock()
    sides = [side(clock, "a", 0.01, noise=0.05), side(clock, "b", 0.01, noise=0.05)]
    found = measure(sides, IMAGES, BenchPlan(budget_s=4), clock=lambda: clock.now)
    assert len(found.end_to_end) >= 4
    assert found.seconds < 4 * 1.3


def test_warming_up_goes_on_while_runs_get_faster_and_is_not_timed() -> None:
    clock = Clock()

    class Slowish(Fake):
        runs = 0

        def timed_run(self, images: Pixels) -> tuple[Pixels, dict[str, float] | None]:
            self.runs += 1
            clock.now += 0.1 * max(0, 10 - self.runs)
            return super().timed_run(images)

    slow = TimedArtifact("a", lambda opening: Slowish(clock, "a", opening, 0.1, 0.0, None))
    found = measure([slow], IMAGES, BenchPlan(), clock=lambda: clock.now)
    assert found.settled == [True, True]
    assert max(max(one) for one in found.runs((0, 1))) == pytest.approx(100)


def test_a_session_that_never_ceases_to_get_faster_is_reported() -> None:
    clock = Clock()

    class Faster(Fake):
        runs = 0

        def timed_run(self, images: Pixels) -> tuple[Pixels, dict[str, float] | None]:
            self.runs += 1
            self.seconds = 0.9**self.runs
            return super().timed_run(images)

    sides = [side(clock, "a"), TimedArtifact("b", lambda n: Faster(clock, "b", n, 1.0, 0.0, None))]
    found = measure(sides, IMAGES, BenchPlan(budget_s=20), clock=lambda: clock.now)
    assert found.settled == [True, True, False]


def test_the_devices_own_time_is_kept_apart_where_every_session_tells_it() -> None:
    clock = Clock()
    told = [side(clock, "a", device=7.0), side(clock, "b", device=14.0)]
    found = measure(told, IMAGES, BenchPlan(), clock=lambda: clock.now)
    assert found.ratios(2, device=True) == pytest.approx([np.log(2)] * len(found.end_to_end))
    assert found.runs((2,), device=True)[0][0] == 14.0
    silent = [side(clock, "a", device=7.0), side(clock, "b")]
    assert measure(silent, IMAGES, BenchPlan(), clock=lambda: clock.now).device is None


def test_the_machine_is_looked_at_after_each_round_while_its_sessions_are_open() -> None:
    clock = Clock()
    seen: list[int] = []
    found = measure(
        [side(clock, "a")],
        IMAGES,
        BenchPlan(),
        sample=lambda: seen.append(len(clock.log) if clock.open else 0),
        clock=lambda: clock.now,
    )
    assert len(seen) == len(found.end_to_end)
    assert seen == sorted(set(seen))
    assert seen[-1] == len(clock.log)


def test_a_graph_with_more_work_is_found_slower_and_its_twin_is_not(make_graph: MakeGraph) -> None:
    quick, slow = make_graph("quick.onnx", work=2), make_graph("slow.onnx", work=20)
    images = np.zeros((1, 128, 128, 3), np.uint8)
    sides = [
        TimedArtifact("quick", lambda _: open_runtime(quick, threads=1)),
        TimedArtifact("slow", lambda _: open_runtime(slow, threads=1)),
    ]
    found = measure(sides, images, BenchPlan(budget_s=2))
    assert np.mean(found.ratios(2)) > np.log(2) > np.mean(found.ratios(1))
