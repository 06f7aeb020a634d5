"""The threads that run one model, each with a session of its own."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from threading import Thread
from typing import Any

import numpy as np
import numpy.typing as npt

from srdeploy.imaging import Pixels
from srdeploy.runtimes.base import Runtime
from srdeploy.serve.scheduling.jobs import Job
from srdeploy.serve.scheduling.planner import Plan, Source, open_sessions, usual_images
from srdeploy.serve.scheduling.scheduler import Scheduler

Run = Callable[[Runtime, Pixels], npt.NDArray[Any]]
"""(open runtime, images uint8 [N, H, W, 3]) -> what a task's `finish` takes, N along its first
axis."""


class Lanes:
    """One model's sessions at work. Close them: what was submitted is run first."""

    def __init__(
        self,
        scheduler: Scheduler,
        sessions: Sequence[Runtime],
        plan: Plan,
        lone: Runtime | None = None,
        run: Run = Runtime.run,
        ahead: int | None = None,
    ) -> None:
        """sessions: the plan's shared ones, open. lone: the plan's session for lone requests.

        run: what is done with a session and images. ahead: how many images may be decoded before
        their turn; None: for each lane its next batch, and one batch more.
        """
        self.plan = plan
        self._scheduler = scheduler
        self._run = run
        # While a lane runs one batch, the next is decoded; and one more for a codec thread.
        self.queue = scheduler.open_queue(ahead or (len(sessions) + 1) * plan.batch + 1)
        self.queue.has_lone = lone is not None
        work = [(runtime, False) for runtime in sessions]
        if lone is not None:
            work.append((lone, True))
        self._threads = [
            Thread(target=self._loop, args=one, name=f"lane-{index}", daemon=True)
            for index, one in enumerate(work)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Runs what is in the queue, and ends the threads; the sessions stay open."""
        self._scheduler.close_queue(self.queue)
        for thread in self._threads:
            thread.join()
        self._scheduler.remove_queue(self.queue)

    def _loop(self, runtime: Runtime, lone: bool) -> None:
        patience_s = self.plan.max_wait_ms / 1000 if self.plan.batch > 1 else 0.0
        most = 1 if lone else self.plan.batch
        while jobs := self._scheduler.take(self.queue, most, patience_s, lone):
            run_jobs(runtime, jobs, self._run)
            self._scheduler.computed(jobs)


def run_jobs(runtime: Runtime, jobs: list[Job], run: Run = Runtime.run) -> None:
    """Sets each job's result or error, from one run of all of them; where that fails, each is run
    by itself, so that one job can't fail the others."""
    images = [job.images for job in jobs if job.images is not None]
    began = [job.end_wait() for job in jobs][-1]
    try:
        result = run(runtime, images[0] if len(images) == 1 else np.concatenate(images))
    except BaseException as error:
        if len(jobs) == 1:
            jobs[0].error = error
            return
        for job in jobs:
            job.begin_wait()
            run_jobs(runtime, [job], run)
        return
    milliseconds = 1000 * (time.monotonic() - began)
    position = 0
    for job, own in zip(jobs, images, strict=True):
        job.result = result[position : position + len(own)]
        position += len(own)
        job.timing.batch = len(result)
        job.timing.compute = milliseconds


# A model that is loaded, warmed up and at work.

WARM_UP_RUNS = 2


class LoadedModel:
    """The sessions of a plan, and the lanes that use them."""

    def __init__(self, scheduler: Scheduler, source: Source, plan: Plan) -> None:
        """Loads the model and runs it a few times. Raises UserError where it can't be run."""
        self.source = source
        self.plan = plan
        with ExitStack() as stack:
            sessions = stack.enter_context(open_sessions(source, plan.shared))
            lone: list[Runtime] = []
            if plan.lone is not None:
                lone = stack.enter_context(open_sessions(source, plan.lone))
            for runtime in (*sessions, *lone):
                for _ in range(WARM_UP_RUNS):
                    runtime.run(usual_images(runtime, 1))
            self._stack = stack.pop_all()
        self.runtime = sessions[0]
        """One of the sessions, to ask what it is."""
        self.lanes = Lanes(scheduler, sessions, plan, lone[0] if lone else None)

    def close(self) -> None:
        """Runs what was submitted, and frees the model."""
        self.lanes.close()
        self._stack.close()
