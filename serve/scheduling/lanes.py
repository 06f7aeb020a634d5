"""The threads that run one model, each with a session of its own."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from threading import Thread

import numpy as np

from srdeploy.imaging import Pixels
from srdeploy.serve.runtime import Runtime, parse_device
from srdeploy.serve.scheduling.job import Job, Result
from srdeploy.serve.scheduling.plan import Plan
from srdeploy.serve.scheduling.planner import usual_images
from srdeploy.serve.scheduling.scheduler import Scheduler
from srdeploy.serve.scheduling.sessions import Source, open_sessions

WARM_UP_RUNS = 2


class Lanes:
    """One loaded and warmed-up model. Close it: what was submitted is run first."""

    def __init__(
        self, scheduler: Scheduler, source: Source, plan: Plan, logits: bool = False
    ) -> None:
        """Loads the model and runs it a few times. Raises UserError where it can't be run.

        logits: tasks finish from logits float32 [N, K, H, W] in place of labels.
        """
        self.source = source
        self.plan = plan
        self._scheduler = scheduler
        self._logits = logits
        with ExitStack() as stack:
            shared = stack.enter_context(open_sessions(source, plan.shared))
            lone = (
                [] if plan.lone is None else stack.enter_context(open_sessions(source, plan.lone))
            )
            for runtime in dict.fromkeys([*shared, *lone]):
                for _ in range(WARM_UP_RUNS):
                    self._run(runtime, usual_images(runtime, 1))
            self._stack = stack.pop_all()
        self.runtime = shared[0]
        """One of the sessions, to ask what it is."""
        # While a lane runs one batch, the next is decoded; and one more for each codec thread.
        on_cpu = parse_device(source.device)[0] == "cpu"
        self.queue = scheduler.open_queue(
            ahead=(len(shared) + 1) * plan.batch + 1,
            lanes=len(shared),
            cores=(plan.shared.threads or 1) if on_cpu else 0,
        )
        self.queue.has_lone = bool(lone)
        self._threads = [
            Thread(
                target=self._loop, args=(runtime, alone), name=f"lane-{source.name}", daemon=True
            )
            for runtimes, alone in ((shared, False), (lone, True))
            for runtime in runtimes
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Runs what is in the queue, and frees the model."""
        self._scheduler.close_queue(self.queue)
        for thread in self._threads:
            thread.join()
        self._scheduler.remove_queue(self.queue)
        self._stack.close()

    def _loop(self, runtime: Runtime, lone: bool) -> None:
        patience_s = self.plan.max_wait_ms / 1000 if self.plan.batch > 1 else 0.0
        most = 1 if lone else self.plan.batch
        while jobs := self._scheduler.take(self.queue, most, patience_s, lone):
            run_jobs(partial(self._run, runtime), jobs)
            self._scheduler.computed(self.queue, jobs)

    def _run(self, runtime: Runtime, images: Pixels) -> Result:
        return runtime.logits(images) if self._logits else runtime.run(images)


def run_jobs(run: Callable[[Pixels], Result], jobs: list[Job]) -> None:
    """Sets each job's result or error, from one run of all of them; where that fails, each is run
    by itself, so that one job can't fail the others."""
    images = [job.images for job in jobs if job.images is not None]
    began = [job.end_wait() for job in jobs][-1]
    try:
        results = run(images[0] if len(images) == 1 else np.concatenate(images))
    except BaseException as error:
        if len(jobs) == 1:
            jobs[0].error = error
            return
        for job in jobs:
            job.begin_wait()
            run_jobs(run, [job])
        return
    milliseconds = 1000 * (time.monotonic() - began)
    position = 0
    for job, own in zip(jobs, images, strict=True):
        job.result = results[position : position + len(own)]
        position += len(own)
        job.timing.batch = len(results)
        job.timing.compute = milliseconds
