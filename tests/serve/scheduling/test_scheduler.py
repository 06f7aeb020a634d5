"""The scheduler and the lanes, with a runtime whose runs the test holds and lets go."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from threading import Event
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srdeploy.errors import UserError
from srdeploy.imaging import Pixels
from srdeploy.serve.artifact import Artifact
from srdeploy.serve.runtime import Logits, Runtime
from srdeploy.serve.scheduling.job import DeadlineError, Job
from srdeploy.serve.scheduling.model import LoadedModel
from srdeploy.serve.scheduling.plan import Layout, Plan
from srdeploy.serve.scheduling.scheduler import Scheduler
from srdeploy.serve.scheduling.sessions import Source
from srdeploy.spec import InputPolicy, Spec

SPEC = Spec(
    classes=("even", "odd"),
    palette=((0, 0, 0), (255, 255, 255)),
    input=InputPolicy(smallest=(1, 1), usual=(2, 2), largest=(8, 8)),
)
POISON = 13


class HeldRuntime(Runtime):
    """Labels are the first channel plus one; a run waits until `go` is set. It fails on POISON."""

    backend = "held"
    precision = "none"

    def __init__(self, threads: int | None, seen: "Queue[tuple[int | None, int]]", go: Event):
        artifact = Artifact("onnx", Path("held"), Path("held"), SPEC, None)
        super().__init__(artifact, SPEC, "cpu", (None, None, None, 3))
        self._threads, self._seen, self._go = threads, seen, go

    def _open(self) -> None:
        pass

    def _close(self) -> None:
        pass

    def _labels(self, images: Pixels) -> Pixels:
        if (images == POISON).all(axis=(1, 2, 3)).any():
            raise UserError("poison")
        if images.max() < 100:  # warm-up runs are noise
            self._seen.put((self._threads, len(images)))
            assert self._go.wait(20)
        return images[..., 0] + np.uint8(1)

    def _logits(self, images: Pixels) -> Logits:
        raise NotImplementedError


@dataclass(frozen=True)
class HeldSource(Source):
    """Opens such runtimes, by threads."""

    seen: "Queue[tuple[int | None, int]]" = field(default_factory=Queue)
    """(threads of the session, images) of every run, as it begins."""
    go: Event = field(default_factory=Event)

    def runtime_of(self, threads: int | None) -> Runtime:
        return HeldRuntime(threads, self.seen, self.go)


@dataclass
class Number:
    """A task whose answer is its number plus one."""

    number: int
    size: int = 2
    prepared: list[int] = field(default_factory=list)
    held: Event | None = None

    def prepare(self) -> Pixels:
        self.prepared.append(self.number)
        if self.held is not None:
            assert self.held.wait(20)
        if self.number < 0:
            raise UserError("a bad image")
        return np.full((1, self.size, self.size, 3), self.number, np.uint8)

    def finish(self, labels: Pixels) -> int:
        assert labels.shape == (1, self.size, self.size)
        assert labels.min() == labels.max()
        return int(labels[0, 0, 0])


class Bench:
    """A scheduler with one model, and what came out of it."""

    def __init__(
        self,
        sessions: int = 1,
        lone: bool = False,
        batch: int = 1,
        codecs: int = 1,
        wait: float = 0,
    ) -> None:
        self.scheduler = Scheduler(codecs)
        self.source = HeldSource("held", Path("held"))
        plan = Plan(
            lone=Layout(sessions=1, threads=8) if lone else None,
            shared=Layout(sessions=sessions, threads=1),
            batch=batch,
            max_wait_ms=wait,
        )
        self.model = LoadedModel(self.scheduler, self.source, plan)
        self.lanes = self.model.lanes
        self.done: Queue[Job] = Queue()

    def submit(self, task: Number, seconds: float = 20) -> Job:
        deadline = time.monotonic() + seconds
        return self.scheduler.submit(self.lanes.queue, task, deadline, self.done.put)

    def next_run(self) -> tuple[int | None, int]:
        return self.source.seen.get(timeout=20)

    def answers(self, count: int) -> list[Any]:
        return [self.done.get(timeout=20).answer for _ in range(count)]

    def close(self) -> None:
        self.source.go.set()
        self.model.close()
        self.scheduler.stop()


@pytest.fixture
def make_bench() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(**options: Any) -> Bench:
        made.append(Bench(**options))
        return made[-1]

    yield make
    for bench in made:
        bench.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_answers_come_in_the_order_of_the_requests(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    bench.source.go.set()
    for number in range(20):
        bench.submit(Number(number % 10))
    assert bench.answers(20) == [number % 10 + 1 for number in range(20)]


def test_a_lone_request_gets_the_session_with_all_threads(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench(sessions=2, lone=True)
    bench.source.go.set()
    for _ in range(3):
        bench.submit(Number(1))
        assert bench.next_run() == (8, 1)
        assert bench.answers(1) == [2]


def test_requests_with_company_are_run_side_by_side(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(sessions=2, lone=True)
    bench.submit(Number(1))
    assert bench.next_run() == (8, 1)  # alone when it came
    bench.submit(Number(2))
    bench.submit(Number(3))
    assert [bench.next_run(), bench.next_run()] == [(1, 1), (1, 1)]
    bench.source.go.set()
    assert sorted(bench.answers(3)) == [2, 3, 4]


def test_the_last_of_many_is_run_although_its_company_has_left(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench(sessions=1, lone=True)
    bench.submit(Number(1))
    bench.submit(Number(2))
    bench.submit(Number(3))
    bench.source.go.set()
    assert sorted(bench.answers(3)) == [2, 3, 4]


def test_jobs_of_one_size_share_a_run_up_to_the_batch(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(batch=3)
    bench.submit(Number(0))
    assert bench.next_run() == (1, 1)  # nobody else was to come
    for number in range(1, 6):
        bench.submit(Number(number, size=2 if number < 5 else 4))
    until(lambda: len(bench.lanes.queue.jobs) == 5)
    bench.source.go.set()
    assert [bench.next_run() for _ in range(3)] == [(1, 3), (1, 1), (1, 1)]
    jobs = [bench.done.get(timeout=20) for _ in range(6)]
    assert [job.answer for job in jobs] == [1, 2, 3, 4, 5, 6]
    assert [job.timing.batch for job in jobs] == [1, 3, 3, 3, 1, 1]


def test_images_of_one_size_find_each_other_between_others(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench(batch=2)
    bench.submit(Number(0))
    bench.next_run()
    for number in range(1, 5):
        bench.submit(Number(number, size=2 if number % 2 else 4))
    until(lambda: len(bench.lanes.queue.jobs) == 4)
    bench.source.go.set()
    assert [bench.next_run() for _ in range(2)] == [(1, 2), (1, 2)]
    assert bench.answers(5) == [1, 2, 4, 3, 5]


def test_a_run_waits_for_images_that_are_being_decoded(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(batch=2, codecs=2, wait=10_000)
    bench.source.go.set()
    held = Event()
    bench.submit(Number(1, held=held))
    bench.submit(Number(2))
    until(lambda: len(bench.lanes.queue.jobs) == 1)
    assert bench.source.seen.empty()
    held.set()
    assert bench.next_run() == (1, 2)


def test_a_job_that_fails_fails_alone(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(batch=4)
    bench.submit(Number(0))
    bench.next_run()
    for number in (1, POISON, 3):
        bench.submit(Number(number))
    until(lambda: len(bench.lanes.queue.jobs) == 3)
    bench.source.go.set()
    jobs = [bench.done.get(timeout=20) for _ in range(4)]
    assert [job.answer for job in jobs] == [1, 2, None, 4]
    assert [str(job.error) for job in jobs] == ["None", "None", "poison", "None"]


def test_a_bad_image_costs_no_run(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    bench.source.go.set()
    bench.submit(Number(-1))
    job = bench.done.get(timeout=20)
    assert str(job.error) == "a bad image"
    assert bench.source.seen.empty()


def test_little_is_decoded_before_its_turn(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(sessions=2, codecs=2)
    prepared: list[int] = []
    for number in range(30):
        bench.submit(Number(number, prepared=prepared))
    assert [bench.next_run(), bench.next_run()] == [(1, 1), (1, 1)]
    until(lambda: len(bench.lanes.queue.jobs) == 4)
    time.sleep(0.05)  # what is too much would come now
    assert len(prepared) == 2 + 4
    bench.source.go.set()
    bench.answers(30)
    assert sorted(prepared) == list(range(30))


def test_a_cancelled_job_is_neither_decoded_nor_told(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    prepared: list[int] = []
    jobs = [bench.submit(Number(number, prepared=prepared)) for number in range(12)]
    bench.next_run()
    until(lambda: len(bench.lanes.queue.jobs) == 3)
    bench.scheduler.cancel(jobs[2])  # decoded, waits to be run
    bench.scheduler.cancel(jobs[11])  # not even decoded
    bench.source.go.set()
    assert bench.answers(10) == [number + 1 for number in range(11) if number != 2]
    assert 11 not in prepared
    assert bench.done.empty()


def test_a_job_past_its_deadline_is_told_so_and_not_run(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    bench.submit(Number(1))
    bench.next_run()
    bench.submit(Number(2), seconds=0.01)
    time.sleep(0.05)
    bench.source.go.set()
    first, second = (bench.done.get(timeout=20) for _ in range(2))
    assert (first.answer, second.answer) == (2, None)
    assert isinstance(second.error, DeadlineError)
    assert bench.source.seen.empty()


def test_closing_runs_what_was_submitted(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(sessions=2, lone=True, batch=2)
    for number in range(9):
        bench.submit(Number(number))
    bench.source.go.set()
    bench.model.close()
    assert sorted(bench.answers(9)) == list(range(1, 10))
    bench.model = LoadedModel(bench.scheduler, bench.source, bench.model.plan)


def test_the_steps_times_add_up_to_the_whole(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    before = time.monotonic()
    bench.submit(Number(1))
    bench.next_run()  # on a busy machine it begins late
    time.sleep(0.03)
    bench.source.go.set()
    timing = bench.done.get(timeout=20).timing
    whole = 1000 * (time.monotonic() - before)
    assert timing.compute >= 25
    assert timing.decode + timing.wait + timing.compute + timing.encode <= whole


@settings(max_examples=25, deadline=None)
@given(
    numbers=st.lists(st.tuples(st.integers(0, 20), st.sampled_from([2, 3, 4])), max_size=40),
    sessions=st.integers(1, 3),
    lone=st.booleans(),
    batch=st.integers(1, 4),
    codecs=st.integers(1, 3),
)
def test_every_job_gets_its_own_answer(
    numbers: list[tuple[int, int]], sessions: int, lone: bool, batch: int, codecs: int
) -> None:
    bench = Bench(sessions=sessions, lone=lone, batch=batch, codecs=codecs, wait=0.5)
    bench.source.go.set()
    wanted = {bench.submit(Number(number, size)): number for number, size in numbers}
    bench.model.close()
    bench.scheduler.stop()
    done = [bench.done.get(timeout=20) for _ in numbers]
    assert set(done) == set(wanted)
    for job in done:
        if wanted[job] == POISON:
            assert str(job.error) == "poison"
        else:
            assert (job.answer, job.error) == (wanted[job] + 1, None)
