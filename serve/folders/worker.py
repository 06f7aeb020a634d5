"""Sessions, lanes and codec threads that turn photos into outputs, all steps side by side."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from math import inf
from queue import SimpleQueue
from types import TracebackType
from typing import Self

from srdeploy.errors import UserError
from srdeploy.serve.folders.photo import Photo
from srdeploy.serve.folders.record import Record, Times
from srdeploy.serve.folders.rendering import needs_logits
from srdeploy.serve.folders.settings import PredictSettings
from srdeploy.serve.folders.store import OutputError, Store
from srdeploy.serve.folders.task import PhotoTask
from srdeploy.serve.folders.views import with_views
from srdeploy.serve.runtime import ImageShapeError, Runtime, parse_device
from srdeploy.serve.scheduling.cores import usable_cores
from srdeploy.serve.scheduling.job import Job
from srdeploy.serve.scheduling.lanes import Lanes
from srdeploy.serve.scheduling.plan import Layout, Plan
from srdeploy.serve.scheduling.planner import Wishes, make_plan
from srdeploy.serve.scheduling.scheduler import Scheduler
from srdeploy.serve.scheduling.sessions import Source, open_sessions

WINDOW = 8
"""Photos under way for each session and image of a batch, at most; few of them are decoded. It
bounds the memory."""
BUCKETS = 4
"""Batches that may be decoded for each session, where photos of one size are gathered into one
run."""
FEW = 4
"""Photos for each core, below which one session with all cores is done sooner."""
MAX_BATCH = 16
"""Photos in one run of a GPU, at most, unless a flag says otherwise."""
MAX_WAIT_MS = 20.0
"""How long a run waits for photos of its size that are being decoded."""


def folder_plan(
    source: Source, photos: int, threads: int | None, batch: int | None, cores: int | None = None
) -> Plan:
    """How `photos` photos are run. threads: of each session; batch: photos in a run; None: what
    does most in a second. cores: of the CPU; None: all. Raises UserError as open_runtime.

    On a GPU this is measured. On a CPU photos are run one by one, in one session of one thread for
    each core: batches and threads do less in a second there.
    """
    runtime = source.runtime_of(threads)
    cores = cores or usable_cores()
    if parse_device(runtime.device)[0] == "cuda":
        wishes = Wishes(threads=threads, max_batch=batch or MAX_BATCH, max_wait_ms=MAX_WAIT_MS)
        return make_plan(source, cores, wishes)
    layout = Layout(sessions=1, threads=threads)
    if runtime.backend != "torch" and photos >= FEW * cores:
        each = threads or 1
        layout = Layout(sessions=max(1, cores // each), threads=each)
    return Plan(lone=None, shared=layout, batch=batch or 1, max_wait_ms=MAX_WAIT_MS)


class Worker:
    """One artifact at work on photos. A context manager: it is open before use."""

    def __init__(
        self,
        source: Source,
        plan: Plan,
        settings: PredictSettings,
        store: Store,
        cores: int | None = None,
    ) -> None:
        """cores: of the CPU, for threads that decode and encode; None: all."""
        self._cores = cores or usable_cores()
        self._source = source
        self.plan = plan
        self._settings = settings
        self._store = store
        self._window = WINDOW * plan.shared.sessions * plan.batch

    def __enter__(self) -> Self:
        """Loads the network. Raises UserError as open_runtime, and where it can't be run so."""
        with ExitStack() as stack:
            plan = self.plan
            plain = open_sessions(self._source, plan.shared, self._seen)
            sessions = stack.enter_context(plain)
            self.spec = sessions[0].spec
            self._scheduler = Scheduler(codec_threads=max(2, self._cores))
            stack.callback(self._scheduler.stop)
            ahead = BUCKETS * plan.shared.sessions * plan.batch if plan.batch > 1 else None
            run = Runtime.logits if needs_logits(self._settings) else Runtime.run
            lanes = Lanes(self._scheduler, sessions, plan, run=run, ahead=ahead)
            self._queue = lanes.queue
            stack.callback(lanes.close)  # what is under way is finished, whatever happens
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def records(self, photos: Iterable[Photo]) -> Iterator[Record]:
        """What became of each photo, in the order in which they are done. Threads may each have
        their own photos under way.

        What ends the job is raised after the records of all that was under way: OutputError, a
        UserError of the network's output, or a fault of ours.
        """
        done: SimpleQueue[Job] = SimpleQueue()
        under_way: set[Job] = set()
        fatal: BaseException | None = None
        more = iter(photos)
        try:
            while True:
                while fatal is None and len(under_way) < self._window:
                    photo = next(more, None)
                    if photo is None:
                        break
                    task = PhotoTask(photo, self.spec, self._settings, self._store)
                    under_way.add(self._scheduler.submit(self._queue, task, inf, done.put))
                if not under_way:
                    break
                job = done.get()
                under_way.discard(job)
                record = _record(job)
                if isinstance(record, Record):
                    yield record
                else:
                    fatal = fatal or record
        finally:
            for job in under_way:
                self._scheduler.cancel(job)
        if fatal is not None:
            raise fatal

    def _seen(self, runtime: Runtime) -> Runtime:
        return with_views(runtime, self._settings, self.plan.batch)


def _record(job: Job) -> Record | BaseException:
    """The photo's record, or what ends the job: what concerns more than this photo."""
    task = job.task
    assert isinstance(task, PhotoTask)
    timing = job.timing
    run = timing.compute / timing.batch if timing.batch else 0.0
    times = Times(timing.decode, run, timing.encode)
    error = job.error
    if error is None:
        assert isinstance(job.answer, Record)
        return replace(job.answer, times=times)
    if isinstance(error, OutputError) or not isinstance(error, UserError | MemoryError):
        return error
    ran = timing.batch > 0
    if task.decoded and not ran and not isinstance(error, ImageShapeError | MemoryError):
        return error  # e.g. a label that is no class: the next photo fares no better
    return replace(task.skipped(error), times=times)
