"""Who works on what: codec threads decode and encode for all models, lanes run the networks.

Every job passes three queues: arrived (to be decoded), ready (to be run, one queue for each model)
and computed (to be encoded). Little is decoded ahead, so memory is bounded by what has arrived, as
bodies, and by a few decoded images for each lane.

A lone request is best run by one session with all cores, many requests by one-threaded sessions
side by side: the lanes' plan says what was measured, and who else is there decides at each run.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from threading import Condition, Lock, Thread
from typing import Any

from srdeploy.serve.scheduling.jobs import DeadlineError, Job, ReadyQueue, Task


class Scheduler:
    """The threads and queues of one process. Lanes take their work with `take`."""

    def __init__(self, codec_threads: int) -> None:
        self._lock = Lock()
        self._for_codec = Condition(self._lock)
        self._queues: list[ReadyQueue] = []
        self._arrived: deque[tuple[Job, ReadyQueue]] = deque()
        self._computed: deque[Job] = deque()
        self._uncomputed = 0
        """Jobs of all models whose result is not there yet."""
        self._stopping = False
        self._codecs = [
            Thread(target=self._codec_loop, name=f"codec-{index}", daemon=True)
            for index in range(codec_threads)
        ]
        for thread in self._codecs:
            thread.start()

    def open_queue(self, ahead: int) -> ReadyQueue:
        """The queue of one model's lanes, of which `ahead` jobs may be decoded before their
        turn."""
        queue = ReadyQueue(self._lock, ahead)
        with self._lock:
            self._queues.append(queue)
        return queue

    def submit(
        self, queue: ReadyQueue, task: Task[Any], deadline: float, done: Callable[[Job], None]
    ) -> Job:
        """Puts the task behind those that came before. `done` is called on another thread."""
        job = Job(task, deadline, done)
        with self._lock:
            assert not queue.closed
            self._uncomputed += 1
            queue.arrived += 1
            self._arrived.append((job, queue))
            self._wake()
        return job

    def cancel(self, job: Job) -> None:
        """Nobody waits for it any longer: it is dropped where it is not under way, and `done` is
        not called."""
        with self._lock:
            job.cancelled = True
            for entry in self._arrived:
                if entry[0] is job:
                    self._arrived.remove(entry)
                    entry[1].arrived -= 1
                    self._uncomputed -= 1
                    self._wake()
                    return

    def take(self, queue: ReadyQueue, most: int, patience_s: float, lone: bool) -> list[Job]:
        """Jobs of one image size for a lane, `most` images at most; [] once the queue is drained.

        patience_s: how long the first of them may wait for others that are about to be ready.
        lone: for the lane that runs lone requests, where the queue has one.
        """
        with self._lock:
            while True:
                self._drop_from(queue)
                patience = None
                if queue.jobs and lone == self._wants_lone(queue):
                    patience = queue.jobs[0].since + patience_s - time.monotonic()
                    if patience <= 0 or not queue.expects(most):
                        jobs = queue.pop(most)
                        self._wake()
                        return jobs
                elif queue.drained:
                    return []
                (queue.lone if lone else queue.shared).wait(patience)

    def computed(self, jobs: Sequence[Job]) -> None:
        """A lane is done with what it took: results or errors are set."""
        with self._lock:
            self._pass_on(jobs)

    def close_queue(self, queue: ReadyQueue) -> None:
        """Nothing more will be submitted to it; what is in it will be run."""
        with self._lock:
            queue.closed = True
            self._wake()

    def remove_queue(self, queue: ReadyQueue) -> None:
        """After its lanes have left it."""
        with self._lock:
            self._queues.remove(queue)

    def stop(self) -> None:
        """Ends the codec threads once there is nothing left for them."""
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
            job, queue = found
            if queue is None:
                _finish(job)
                continue
            _prepare(job)
            with self._lock:
                queue.coming -= 1
                if job.images is None:
                    self._pass_on([job])
                else:
                    queue.jobs.append(job)
                    self._wake()

    def _next_for_codec(self) -> tuple[Job, ReadyQueue | None] | None:
        """The next job, and the queue that it is to be decoded for; None where it is to be encoded.

        What is computed goes first: it frees the most, and its client has waited longest.
        """
        while True:
            if self._computed:
                return self._computed.popleft(), None
            for entry in self._arrived:
                if entry[1].room:
                    self._arrived.remove(entry)
                    entry[1].arrived -= 1
                    entry[1].coming += 1
                    return entry
            if self._stopping:
                return None
            self._for_codec.wait()

    def _pass_on(self, jobs: Sequence[Job]) -> None:
        """To the codec threads, which tell errors as they tell answers."""
        self._uncomputed -= len(jobs)
        for job in jobs:
            job.begin_wait()
            self._computed.append(job)
        self._wake()

    def _drop_from(self, queue: ReadyQueue) -> None:
        """Takes out what nobody waits for any longer."""
        if dropped := [job for job in queue.jobs if _dropped(job)]:
            for job in dropped:
                queue.jobs.remove(job)
            self._pass_on(dropped)

    def _wants_lone(self, queue: ReadyQueue) -> bool:
        """Whether the next run is the lone lane's."""
        return queue.has_lone and self._uncomputed == 1

    def _wake(self) -> None:
        """After every change: wakes whom it concerns. Whoever wakes looks for itself."""
        decodable = sum(min(queue.arrived, queue.room) for queue in self._queues)
        self._for_codec.notify(len(self._computed) + decodable)
        for queue in self._queues:
            if queue.drained:
                queue.lone.notify_all()
                queue.shared.notify_all()
            elif queue.jobs:
                (queue.lone if self._wants_lone(queue) else queue.shared).notify()


def _prepare(job: Job) -> None:
    began = job.end_wait()
    if not _dropped(job):
        try:
            job.images = job.task.prepare()
        except BaseException as error:  # told to the one who asked; the thread lives on
            job.error = error
    job.timing.decode = 1000 * (time.monotonic() - began)
    job.begin_wait()


def _finish(job: Job) -> None:
    began = job.end_wait()
    if not _dropped(job):
        try:
            assert job.result is not None
            job.answer = job.task.finish(job.result)
        except BaseException as error:
            job.error = error
    job.images = job.result = None
    job.timing.encode = 1000 * (time.monotonic() - began)
    if not job.cancelled:
        job.done(job)


def _dropped(job: Job) -> bool:
    """Whether nobody waits for its answer any longer, or there will be none."""
    if job.error is None and job.late:
        job.error = DeadlineError("the deadline passed before the answer was there")
    return job.cancelled or job.error is not None
