"""The threads that run one model, each with a session of its own."""

import time
from contextlib import ExitStack
from threading import Thread

import numpy as np

from srdeploy.serve.runtime import Runtime, parse_device
from srdeploy.serve.server.card import ModelCard
from srdeploy.serve.server.job import Job
from srdeploy.serve.server.plan import Plan
from srdeploy.serve.server.planner import usual_images
from srdeploy.serve.server.scheduler import Scheduler
from srdeploy.serve.server.sessions import Source, open_sessions

WARM_UP_RUNS = 2


class Lanes:
    """One loaded and warmed-up model. Close it: what was submitted is run first."""

    def __init__(self, scheduler: Scheduler, source: Source, plan: Plan, version: int) -> None:
        """Loads the model and runs it a few times. Raises UserError where it can't be run."""
        self.source = source
        self.plan = plan
        self._scheduler = scheduler
        with ExitStack() as stack:
            shared = stack.enter_context(open_sessions(source, plan.shared))
            lone = (
                [] if plan.lone is None else stack.enter_context(open_sessions(source, plan.lone))
            )
            for runtime in dict.fromkeys([*shared, *lone]):
                for _ in range(WARM_UP_RUNS):
                    runtime.run(usual_images(runtime, 1))
            self._stack = stack.pop_all()
        self.card = ModelCard.of(source.name, version, shared[0])
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
            run_jobs(runtime, jobs)
            self._scheduler.computed(self.queue, jobs)


def run_jobs(runtime: Runtime, jobs: list[Job]) -> None:
    """Sets each job's labels or error, from one run of all of them; where that fails, each is run
    by itself, so that one job can't fail the others."""
    images = [job.images for job in jobs if job.images is not None]
    began = [job.end_wait() for job in jobs][-1]
    try:
        labels = runtime.run(images[0] if len(images) == 1 else np.concatenate(images))
    except BaseException as error:
        if len(jobs) == 1:
            jobs[0].error = error
            return
        for job in jobs:
            job.begin_wait()
            run_jobs(runtime, [job])
        return
    milliseconds = 1000 * (time.monotonic() - began)
    position = 0
    for job, own in zip(jobs, images, strict=True):
        job.labels = labels[position : position + len(own)]
        position += len(own)
        job.timing.batch = len(labels)
        job.timing.compute = milliseconds
