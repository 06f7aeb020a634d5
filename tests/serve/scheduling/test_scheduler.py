"""The scheduler and its workers, with a runtime whose runs the test holds and releases."""

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

from srdeploy.artifacts.artifact import Artifact
from srdeploy.errors import UserError
from srdeploy.imaging import Pixels
from srdeploy.runtimes.base import Logits, Runtime
from srdeploy.serve.scheduling.planner import ModelSource, SessionLayout, SessionPlan
from srdeploy.serve.scheduling.scheduler import DeadlineError, Scheduler, WorkItem
from srdeploy.serve.scheduling.workers import LoadedModel
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
class HeldSource(ModelSource):
    """Makes held runtimes."""

    seen: "Queue[tuple[int | None, int]]" = field(default_factory=Queue)
    """(threads of the session, images) of every run, as it begins."""
    go: Event = field(default_factory=Event)

    def make_runtime(self, threads: int | None) -> Runtime:
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


class SchedulerHarness:
    """A scheduler with one model, and the items that it finished."""

    def __init__(
        self,
        sessions: int = 1,
        latency: bool = False,
        batch: int = 1,
        codecs: int = 1,
        wait: float = 0,
    ) -> None:
        self.scheduler = Scheduler(codecs)
        self.source = HeldSource("held", Path("held"))
        plan = SessionPlan(
            latency=SessionLayout(sessions=1, threads=8) if latency else None,
            shared=SessionLayout(sessions=sessions, threads=1),
            batch=batch,
            max_wait_ms=wait,
        )
        self.model = LoadedModel(self.scheduler, self.source, plan)
        self.workers = self.model.workers
        self.done: Queue[WorkItem] = Queue()

    def submit(self, task: Number, seconds: float = 20) -> WorkItem:
        deadline = time.monotonic() + seconds
        return self.scheduler.submit(self.workers.queue, task, deadline, self.done.put)

    def next_run(self) -> tuple[int | None, int]:
        return self.source.seen.get(timeout=20)

    def answers(self, count: int) -> list[Any]:
        return [self.done.get(timeout=20).answer for _ in range(count)]

    def close(self) -> None:
        self.source.go.set()
        self.model.close()
        self.scheduler.stop()


@pytest.fixture
def make_harness() -> Iterator[Callable[..., SchedulerHarness]]:
    made: list[SchedulerHarness] = []

    def make(**options: Any) -> SchedulerHarness:
        made.append(SchedulerHarness(**options))
        return made[-1]

    yield make
    for harness in made:
        harness.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_answers_come_in_the_order_of_the_requests(
    make_harness: Callable[..., SchedulerHarness],
) -> None:
    harness = make_harness()
    harness.source.go.set()
    for number in range(20):
        harness.submit(Number(number % 10))
    assert harness.answers(20) == [number % 10 + 1 for number in range(20)]


def test_a_single_request_gets_the_latency_session(
    make_harness: Callable[..., SchedulerHarness],
) -> None:
    harness = make_harness(sessions=2, latency=True)
    harness.source.go.set()
    for _ in range(3):
        harness.submit(Number(1))
        assert harness.next_run() == (8, 1)
        assert harness.answers(1) == [2]


def test_concurrent_requests_run_in_parallel(
    make_harness: Callable[..., SchedulerHarness],
) -> None:
    harness = make_harness(sessions=2, latency=True)
    harness.submit(Number(1))
    assert harness.next_run() == (8, 1)  # alone when it came
    harness.submit(Number(2))
    harness.submit(Number(3))
    assert [harness.next_run(), harness.next_run()] == [(1, 1), (1, 1)]
    harness.source.go.set()
    assert sorted(harness.answers(3)) == [2, 3, 4]


def test_the_last_of_many_requests_is_run_by_either_session(
    make_harness: Callable[..., SchedulerHarness],
) -> None:
    harness = make_harness(sessions=1, latency=True)
    harness.submit(Number(1))
    harness.submit(Number(2))
    harness.submit(Number(3))
    harness.source.go.set()
    assert sorted(harness.answers(3)) == [2, 3, 4]


def test_items_of_one_size_share_a_run_up_to_the_batch(
    make_harness: Callable[..., SchedulerHarness],
) -> None:
    harness = make_harness(batch=3)
    harness.submit(Number(0))
    assert harness.next_run() == (1, 1)  # nobody else was to come
    for number in range(1, 6):
        harness.submit(Number(number, size=2 if number < 5 else 4))
    until(lambda: len(harness.workers.queue.ready) == 5)
    harness.source.go.set()
    assert [harness.next_run() for _ in range(3)] == [(1, 3), (1, 1), (1, 1)]
    items = [harness.done.get(timeout=20) for _ in range(6)]
    assert [item.answer for item in items] == [1, 2, 3, 4, 5, 6]
    assert [item.timing.batch for item in items] == [1, 3, 3, 3, 1, 1]


def test_images_of_one_size_find_each_other_between_others(
    make_harness: Callable[..., SchedulerHarness],
) -> None:
    harness = make_harness(batch=2)
    harness.submit(Number(0))
    harness.next_run()
    for number in range(1, 5):
        harness.submit(Number(number, size=2 if number % 2 else 4))
    until(lambda: len(harness.workers.queue.ready) == 4)
    harness.source.go.set()
    assert [harness.next_run() for _ in range(2)] == [(1, 2), (1, 2)]
    assert harness.answers(5) == [1, 2, 4, 3, 5]


def test_a_run_waits_for_images_that_are_being_decoded(
    make_harness: Callable[..., SchedulerHarness],
) -> None:
    harness = make_harness(batch=2, codecs=2, wait=10_000)
    harness.source.go.set()
    held = Event()
    harness.submit(Number(1, held=held))
    harness.submit(Number(2))
    until(lambda: len(harness.workers.queue.ready) == 1)
    assert harness.source.seen.empty()
    held.set()
    assert harness.next_run() == (1, 2)


def test_an_item_that_fails_fails_no_other(make_harness: Callable[..., SchedulerHarness]) -> None:
    harness = make_harness(batch=4)
    harness.submit(Number(0))
    harness.next_run()
    for number in (1, POISON, 3):
        harness.submit(Number(number))
    until(lambda: len(harness.workers.queue.ready) == 3)
    harness.source.go.set()
    items = [harness.done.get(timeout=20) for _ in range(4)]
    assert [item.answer for item in items] == [1, 2, None, 4]
    assert [str(item.error) for item in items] == ["None", "None", "poison", "None"]


def test_a_bad_image_costs_no_run(make_harness: Callable[..., SchedulerHarness]) -> None:
    harness = make_harness()
    harness.source.go.set()
    harness.submit(Number(-1))
    item = harness.done.get(timeout=20)
    assert str(item.error) == "a bad image"
    assert harness.source.seen.empty()


def test_little_is_decoded_before_its_turn(make_harness: Callable[..., SchedulerHarness]) -> None:
    harness = make_harness(sessions=2, codecs=2)
    prepared: list[int] = []
    for number in range(30):
        harness.submit(Number(number, prepared=prepared))
    assert [harness.next_run(), harness.next_run()] == [(1, 1), (1, 1)]
    until(lambda: len(harness.workers.queue.ready) == 4)
    time.sleep(0.05)  # what is too much would come now
    assert len(prepared) == 2 + 4
    harness.source.go.set()
    harness.answers(30)
    assert sorted(prepared) == list(range(30))


def test_a_cancelled_item_is_neither_decoded_nor_delivered(
    make_harness: Callable[..., SchedulerHarness],
) -> None:
    harness = make_harness()
    prepared: list[int] = []
    items = [harness.submit(Number(number, prepared=prepared)) for number in range(12)]
    harness.next_run()
    until(lambda: len(harness.workers.queue.ready) == 3)
    harness.scheduler.cancel(items[2])  # decoded, waits to be run
    harness.scheduler.cancel(items[11])  # not even decoded
    harness.source.go.set()
    assert harness.answers(10) == [number + 1 for number in range(11) if number != 2]
    assert 11 not in prepared
    assert harness.done.empty()


def test_an_item_past_its_deadline_fails_and_is_not_run(
    make_harness: Callable[..., SchedulerHarness],
) -> None:
    harness = make_harness()
    harness.submit(Number(1))
    harness.next_run()
    harness.submit(Number(2), seconds=0.01)
    time.sleep(0.05)
    harness.source.go.set()
    first, second = (harness.done.get(timeout=20) for _ in range(2))
    assert (first.answer, second.answer) == (2, None)
    assert isinstance(second.error, DeadlineError)
    assert harness.source.seen.empty()


def test_closing_runs_what_was_submitted(make_harness: Callable[..., SchedulerHarness]) -> None:
    harness = make_harness(sessions=2, latency=True, batch=2)
    for number in range(9):
        harness.submit(Number(number))
    harness.source.go.set()
    harness.model.close()
    assert sorted(harness.answers(9)) == list(range(1, 10))
    harness.model = LoadedModel(harness.scheduler, harness.source, harness.model.plan)


def test_the_steps_times_add_up_to_the_whole(make_harness: Callable[..., SchedulerHarness]) -> None:
    harness = make_harness()
    before = time.monotonic()
    harness.submit(Number(1))
    harness.next_run()  # on a busy machine it begins late
    time.sleep(0.03)
    harness.source.go.set()
    timing = harness.done.get(timeout=20).timing
    whole = 1000 * (time.monotonic() - before)
    assert timing.compute >= 25
    assert timing.decode + timing.wait + timing.compute + timing.encode <= whole


@settings(max_examples=25, deadline=None)
@given(
    numbers=st.lists(st.tuples(st.integers(0, 20), st.sampled_from([2, 3, 4])), max_size=40),
    sessions=st.integers(1, 3),
    latency=st.booleans(),
    batch=st.integers(1, 4),
    codecs=st.integers(1, 3),
)
def test_every_item_gets_its_own_answer(
    numbers: list[tuple[int, int]], sessions: int, latency: bool, batch: int, codecs: int
) -> None:
    harness = SchedulerHarness(
        sessions=sessions, latency=latency, batch=batch, codecs=codecs, wait=0.5
    )
    harness.source.go.set()
    wanted = {harness.submit(Number(number, size)): number for number, size in numbers}
    harness.model.close()
    harness.scheduler.stop()
    done = [harness.done.get(timeout=20) for _ in numbers]
    assert set(done) == set(wanted)
    for item in done:
        if wanted[item] == POISON:
            assert str(item.error) == "poison"
        else:
            assert (item.answer, item.error) == (wanted[item] + 1, None)
