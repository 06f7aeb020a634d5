"""The worker threads that run one model, each with its own session."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from threading import Thread
from typing import Any

import numpy as np
import numpy.typing as npt

from srdeploy.imaging import Pixels
from srdeploy.runtimes.base import Runtime
from srdeploy.serve.scheduling.planner import (
    ModelSource,
    SessionPlan,
    open_sessions,
    synthetic_images,
)
from srdeploy.serve.scheduling.scheduler import Scheduler, WorkItem

WARM_UP_RUNS = 2

RunFunction = Callable[[Runtime, Pixels], npt.NDArray[Any]]
"""(open runtime, images uint8 [N, H, W, 3]) -> the argument of a task's `finish`, N on axis 0."""


class LoadedModel:
    """A model at work: its sessions, opened and warmed up, and their workers."""

    def __init__(self, scheduler: Scheduler, source: ModelSource, plan: SessionPlan) -> None:
        """Loads the model and runs it a few times. Raises UserError if it can't be run."""
        self.source = source
        self.plan = plan
        with ExitStack() as stack:
            sessions = stack.enter_context(open_sessions(source, plan.shared))
            latency: list[Runtime] = []
            if plan.latency is not None:
                latency = stack.enter_context(open_sessions(source, plan.latency))
            for runtime in (*sessions, *latency):
                for _ in range(WARM_UP_RUNS):
                    runtime.run(synthetic_images(runtime, 1))
            self._stack = stack.pop_all()
        self.runtime = sessions[0]
        """One of the sessions, to read the model's properties from."""
        self.workers = ModelWorkers(scheduler, sessions, plan, latency[0] if latency else None)

    def close(self) -> None:
        """Runs what was submitted, and frees the model."""
        self.workers.close()
        self._stack.close()


class ModelWorkers:
    """One worker thread for each session of a model. `close` first runs what was submitted."""

    def __init__(
        self,
        scheduler: Scheduler,
        sessions: Sequence[Runtime],
        plan: SessionPlan,
        latency: Runtime | None = None,
        run: RunFunction = Runtime.run,
        ahead: int | None = None,
    ) -> None:
        """sessions: the plan's shared sessions, open. latency: the plan's latency session.

        run: how a session runs images. ahead: how many images may be decoded before their turn;
        None: each worker's next batch, and one batch more.
        """
        self.plan = plan
        self._scheduler = scheduler
        self._run = run
        # While a worker runs one batch, the next is decoded; and one more for a codec thread.
        ahead = ahead or (len(sessions) + 1) * plan.batch + 1
        self.queue = scheduler.open_queue(ahead, has_latency_worker=latency is not None)
        work = [(runtime, False) for runtime in sessions]
        if latency is not None:
            work.append((latency, True))
        self._threads = [
            Thread(target=self._loop, args=one, name=f"worker-{index}", daemon=True)
            for index, one in enumerate(work)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Runs what is queued and ends the threads; the sessions stay open."""
        self._scheduler.close_queue(self.queue)
        for thread in self._threads:
            thread.join()
        self._scheduler.remove_queue(self.queue)

    def _loop(self, runtime: Runtime, latency: bool) -> None:
        max_wait_s = self.plan.max_wait_ms / 1000 if self.plan.batch > 1 else 0.0
        most = 1 if latency else self.plan.batch
        while items := self._scheduler.take(self.queue, most, max_wait_s, latency):
            _run_items(runtime, items, self._run)
            self._scheduler.computed(items)


def _run_items(runtime: Runtime, items: list[WorkItem], run: RunFunction) -> None:
    """Sets each item's result or error from one run of all of them. If that run fails, each is run
    by itself, so that one item can't fail the others."""
    images = [item.images for item in items if item.images is not None]
    began = [item.end_wait() for item in items][-1]
    try:
        result = run(runtime, images[0] if len(images) == 1 else np.concatenate(images))
    except BaseException as error:
        if len(items) == 1:
            items[0].error = error
            return
        for item in items:
            item.begin_wait()
            _run_items(runtime, [item], run)
        return
    milliseconds = 1000 * (time.monotonic() - began)
    position = 0
    for item, own in zip(items, images, strict=True):
        item.result = result[position : position + len(own)]
        position += len(own)
        item.timing.batch = len(result)
        item.timing.compute = milliseconds
