"""The queues and codec threads of one process.

Codec threads decode and encode for all models; each model's worker threads run its network. Every
item passes three queues: arrived (to be decoded), ready (to be run, one queue for each model) and
computed (to be encoded). Few items are decoded ahead, so memory is bounded by the encoded bodies of
what has arrived and by a few decoded images for each worker.

One request runs fastest on one session with all cores, many concurrent requests on single-threaded
sessions in parallel. The session plan says what was measured; how many requests there are decides
at each run.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from threading import Condition, Lock, Thread
from typing import Any, Generic, Protocol, TypeVar

import numpy.typing as npt

from srdeploy.errors import UserError
from srdeploy.imaging import Pixels

Answer_co = TypeVar("Answer_co", covariant=True)

STEPS = ("decode", "wait", "compute", "encode")
"""The steps of an item, as the fields of TaskTiming name them."""


class Task(Protocol, Generic[Answer_co]):
    """The work of one image or tensor, before and after the network runs.

    `prepare` and `finish` run on a codec thread. Either may raise a UserError, which fails only
    this task.
    """

    def prepare(self) -> Pixels:
        """The images as the network takes them, uint8 [N, H, W, 3]."""

    def finish(self, result: npt.NDArray[Any], /) -> Answer_co:
        """The answer, from the network's result for the prepared images: labels uint8 [N, H, W] or
        logits float32 [N, K, H, W]."""


class DeadlineError(UserError):
    """The item's deadline passed before it was done."""


@dataclass
class TaskTiming:
    """Milliseconds of each step of one item, and the number of images in its run."""

    decode: float = 0.0
    wait: float = 0.0
    """Time spent waiting for a codec thread and for a worker."""
    compute: float = 0.0
    """Duration of the whole run, which other items may have shared."""
    encode: float = 0.0
    batch: int = 0


@dataclass(eq=False)
class WorkItem:
    """A submitted task. It is handed from thread to thread; one thread has it at a time."""

    task: Task[Any]
    deadline: float
    """A time on time.monotonic's clock."""
    done: Callable[["WorkItem"], None]
    """Called once, on some thread, when `answer` or `error` is set; never after cancellation."""
    timing: TaskTiming = field(default_factory=TaskTiming)
    images: Pixels | None = None
    result: npt.NDArray[Any] | None = None
    answer: Any = None
    error: BaseException | None = None
    cancelled: bool = False
    since: float = field(default_factory=time.monotonic)
    """When its current wait began."""

    @property
    def size(self) -> int:
        """Number of decoded images."""
        assert self.images is not None
        return len(self.images)

    def begin_wait(self) -> None:
        """Starts the clock of a wait for a thread."""
        self.since = time.monotonic()

    def end_wait(self) -> float:
        """Adds the wait to the timing; returns the current time, where the next step begins."""
        now = time.monotonic()
        self.timing.wait += 1000 * (now - self.since)
        return now

    def check_dropped(self) -> bool:
        """Whether it needs no more work: it was cancelled, it failed, or it is past its deadline,
        which is an error too."""
        if self.error is None and time.monotonic() > self.deadline:
            self.error = DeadlineError("the deadline passed before the answer was there")
        return self.cancelled or self.error is not None


class ModelQueue:
    """Items of one model that wait for its workers. Whoever touches it holds the scheduler's
    lock."""

    def __init__(self, lock: Lock, ahead: int, has_latency_worker: bool) -> None:
        """ahead: how many items may be decoded before their turn."""
        self.ready: deque[WorkItem] = deque()
        """Decoded items."""
        self.arrived = 0
        """Number of items that no codec thread has taken yet."""
        self.decoding = 0
        """Number of items that are being decoded."""
        self.closed = False
        self.has_latency_worker = has_latency_worker
        self.latency = Condition(lock)
        """What the latency worker waits on."""
        self.shared = Condition(lock)
        """What the other workers wait on."""
        self._ahead = ahead

    @property
    def waiting(self) -> int:
        """Number of items that no worker has taken yet."""
        return self.arrived + self.decoding + len(self.ready)

    @property
    def room(self) -> int:
        """How many more items may be decoded: decoded images are large, encoded bodies small."""
        return self._ahead - self.decoding - len(self.ready)

    @property
    def drained(self) -> bool:
        """Whether it is closed and empty."""
        return self.closed and not self.waiting

    def expects_more(self, most: int) -> bool:
        """Whether a run of up to `most` images would be fuller if it waited."""
        if not (self.decoding or (self.arrived and self.room > 0)):
            return False
        return sum(item.size for item in self._next_batch(most)) < most

    def pop(self, most: int) -> list[WorkItem]:
        """The first item and others of its height and width, in their order: up to `most` images,
        or the first item's own if they are more."""
        batch = self._next_batch(most)
        for item in batch:
            self.ready.remove(item)
        return batch

    def _next_batch(self, most: int) -> list[WorkItem]:
        first = self.ready[0]
        assert first.images is not None
        batch, images = [first], first.size
        for item in islice(self.ready, 1, None):
            assert item.images is not None
            if images + item.size > most:
                break
            if item.images.shape[1:] == first.images.shape[1:]:
                batch.append(item)
                images += item.size
        return batch


class Scheduler:
    """The codec threads and queues of one process. Workers get their items from `take`."""

    def __init__(self, codec_threads: int) -> None:
        self._lock = Lock()
        self._for_codec = Condition(self._lock)
        self._queues: list[ModelQueue] = []
        self._arrived: deque[tuple[WorkItem, ModelQueue]] = deque()
        self._computed: deque[WorkItem] = deque()
        self._uncomputed = 0
        """Number of items of all models that have no result yet."""
        self._stopping = False
        self._codecs = [
            Thread(target=self._codec_loop, name=f"codec-{index}", daemon=True)
            for index in range(codec_threads)
        ]
        for thread in self._codecs:
            thread.start()

    def open_queue(self, ahead: int, has_latency_worker: bool = False) -> ModelQueue:
        """A new model's queue, of which `ahead` items may be decoded before their turn."""
        queue = ModelQueue(self._lock, ahead, has_latency_worker)
        with self._lock:
            self._queues.append(queue)
        return queue

    def submit(
        self, queue: ModelQueue, task: Task[Any], deadline: float, done: Callable[[WorkItem], None]
    ) -> WorkItem:
        """Queues the task. `done` is called on another thread."""
        item = WorkItem(task, deadline, done)
        with self._lock:
            assert not queue.closed
            self._uncomputed += 1
            queue.arrived += 1
            self._arrived.append((item, queue))
            self._notify()
        return item

    def cancel(self, item: WorkItem) -> None:
        """Drops the item unless it is being processed; `done` is not called either way."""
        with self._lock:
            item.cancelled = True
            for entry in self._arrived:
                if entry[0] is item:
                    self._arrived.remove(entry)
                    entry[1].arrived -= 1
                    self._uncomputed -= 1
                    self._notify()
                    return

    def take(
        self, queue: ModelQueue, most: int, max_wait_s: float, latency: bool
    ) -> list[WorkItem]:
        """Items of one image size for a worker, up to `most` images; [] once the queue is drained.

        max_wait_s: how long the first item may wait for others that are about to be ready.
        latency: whether the caller is the queue's latency worker.
        """
        with self._lock:
            while True:
                self._remove_dropped(queue)
                timeout = None
                if queue.ready and latency == self._is_for_latency(queue):
                    timeout = queue.ready[0].since + max_wait_s - time.monotonic()
                    if timeout <= 0 or not queue.expects_more(most):
                        items = queue.pop(most)
                        self._notify()
                        return items
                elif queue.drained:
                    return []
                (queue.latency if latency else queue.shared).wait(timeout)

    def computed(self, items: Sequence[WorkItem]) -> None:
        """Hands back items that a worker took; their results or errors are set."""
        with self._lock:
            self._pass_to_codec(items)

    def close_queue(self, queue: ModelQueue) -> None:
        """Ends submission to the queue; the items in it are still run."""
        with self._lock:
            queue.closed = True
            self._notify()

    def remove_queue(self, queue: ModelQueue) -> None:
        """Forgets a closed queue, after its workers have ended."""
        with self._lock:
            self._queues.remove(queue)

    def stop(self) -> None:
        """Ends the codec threads once nothing is left for them to do."""
        with self._lock:
            self._stopping = True
            self._for_codec.notify_all()
        for thread in self._codecs:
            thread.join()

    def _codec_loop(self) -> None:
        while True:
            with self._lock:
                found = self._next_for_codec()
            if found is None:
                return
            item, queue = found
            if queue is None:
                _finish(item)
                continue
            _prepare(item)
            with self._lock:
                queue.decoding -= 1
                if item.images is None:
                    self._pass_to_codec([item])
                else:
                    queue.ready.append(item)
                    self._notify()

    def _next_for_codec(self) -> tuple[WorkItem, ModelQueue | None] | None:
        """The next item, and the queue that it is to be decoded for; None if it is to be encoded.

        Computed items go first: that frees the most memory, and their clients waited longest.
        """
        while True:
            if self._computed:
                return self._computed.popleft(), None
            for entry in self._arrived:
                if entry[1].room:
                    self._arrived.remove(entry)
                    entry[1].arrived -= 1
                    entry[1].decoding += 1
                    return entry
            if self._stopping:
                return None
            self._for_codec.wait()

    def _pass_to_codec(self, items: Sequence[WorkItem]) -> None:
        """Queues items to be encoded. Codec threads deliver errors as they deliver answers."""
        self._uncomputed -= len(items)
        for item in items:
            item.begin_wait()
            self._computed.append(item)
        self._notify()

    def _remove_dropped(self, queue: ModelQueue) -> None:
        if dropped := [item for item in queue.ready if item.check_dropped()]:
            for item in dropped:
                queue.ready.remove(item)
            self._pass_to_codec(dropped)

    def _is_for_latency(self, queue: ModelQueue) -> bool:
        """Whether the latency worker does the next run: nothing else needs the cores."""
        return queue.has_latency_worker and self._uncomputed == 1

    def _notify(self) -> None:
        """Notifies waiters after a change; each re-checks its predicate."""
        decodable = sum(min(queue.arrived, queue.room) for queue in self._queues)
        self._for_codec.notify(len(self._computed) + decodable)
        for queue in self._queues:
            if queue.drained:
                queue.latency.notify_all()
                queue.shared.notify_all()
            elif queue.ready:
                (queue.latency if self._is_for_latency(queue) else queue.shared).notify()


def _prepare(item: WorkItem) -> None:
    began = item.end_wait()
    if not item.check_dropped():
        try:
            item.images = item.task.prepare()
        except BaseException as error:  # goes to the submitter; the thread lives on
            item.error = error
    item.timing.decode = 1000 * (time.monotonic() - began)
    item.begin_wait()


def _finish(item: WorkItem) -> None:
    began = item.end_wait()
    if not item.check_dropped():
        try:
            assert item.result is not None
            item.answer = item.task.finish(item.result)
        except BaseException as error:
            item.error = error
    item.images = item.result = None
    item.timing.encode = 1000 * (time.monotonic() - began)
    if not item.cancelled:
        item.done(item)
