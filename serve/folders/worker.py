"""Runs one artifact on photos: sessions that run, and threads that decode and encode meanwhile."""

import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import inf
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

import numpy.typing as npt

from srdeploy.environment import usable_cores
from srdeploy.errors import UserError
from srdeploy.imaging import Pixels, decode_photo, fit
from srdeploy.runtimes.base import ImageShapeError, Runtime, parse_device
from srdeploy.serve.folders.paths import explain_remote_error, file_system_of, is_url, local_path
from srdeploy.serve.folders.records import OutputFile, Photo, Record, Times
from srdeploy.serve.folders.rendering import needs_logits, needs_picture, render, with_views
from srdeploy.serve.folders.settings import PredictSettings
from srdeploy.serve.folders.stores import OutputError, Store
from srdeploy.serve.scheduling.planner import (
    ModelSource,
    PlanConstraints,
    SessionLayout,
    SessionPlan,
    make_plan,
    open_sessions,
)
from srdeploy.serve.scheduling.scheduler import Scheduler, WorkItem
from srdeploy.serve.scheduling.workers import ModelWorkers
from srdeploy.spec import Spec

MAX_BYTES = 2 * 1024**3
"""Nobody could decode a larger photo, and it would fill the memory first."""
WINDOW = 8
"""In-flight photos for each session and image of a batch, at most; few of them are decoded. It
bounds the memory."""
BUCKETS = 4
"""Batches that may be decoded for each session, where photos of one size run together."""
FEW = 4
"""Photos for each core; with fewer, one session with all cores is done sooner."""
MAX_BATCH = 16
"""Photos in one run of a GPU, at most, unless a flag says otherwise."""
MAX_WAIT_MS = 20.0
"""How long a run waits for photos of its size that are being decoded."""


def folder_plan(
    source: ModelSource,
    photos: int,
    threads: int | None,
    batch: int | None,
    cores: int | None = None,
) -> SessionPlan:
    """How `photos` photos are run. threads: of each session; batch: photos in a run; None: the
    fastest. cores: of the CPU; None: all. Raises UserError as open_runtime.

    On a GPU this is measured. On a CPU photos run one by one, in one session of one thread for each
    core: batches and more threads are slower there.
    """
    runtime = source.make_runtime(threads)
    cores = cores or usable_cores()
    if parse_device(runtime.device)[0] == "cuda":
        constraints = PlanConstraints(
            threads=threads, max_batch=batch or MAX_BATCH, max_wait_ms=MAX_WAIT_MS
        )
        return make_plan(source, cores, constraints)
    layout = SessionLayout(sessions=1, threads=threads)
    if runtime.backend != "torch" and photos >= FEW * cores:
        each = threads or 1
        layout = SessionLayout(sessions=max(1, cores // each), threads=each)
    return SessionPlan(shared=layout, batch=batch or 1, max_wait_ms=MAX_WAIT_MS)


class Worker:
    """Runs one artifact on photos. A context manager that must be open before use."""

    def __init__(
        self,
        source: ModelSource,
        plan: SessionPlan,
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
        """Loads the network. Raises UserError as open_runtime, and if it can't be run like that."""
        with ExitStack() as stack:
            plan = self.plan
            plain = open_sessions(self._source, plan.shared, self._with_views)
            sessions = stack.enter_context(plain)
            self.spec = sessions[0].spec
            self._scheduler = Scheduler(codec_threads=max(2, self._cores))
            stack.callback(self._scheduler.stop)
            ahead = BUCKETS * plan.shared.sessions * plan.batch if plan.batch > 1 else None
            run = Runtime.logits if needs_logits(self._settings) else Runtime.run
            workers = ModelWorkers(self._scheduler, sessions, plan, run=run, ahead=ahead)
            self._queue = workers.queue
            stack.callback(workers.close)  # finish in-flight photos, whatever happens
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
        """The record of each photo, in the order in which they are done. Thread-safe.

        What ends the job is raised after the records of all in-flight photos: OutputError, a
        UserError of the network's output, or a fault of ours.
        """
        done: SimpleQueue[WorkItem] = SimpleQueue()
        in_flight: set[WorkItem] = set()
        fatal: BaseException | None = None
        more = iter(photos)
        try:
            while True:
                while fatal is None and len(in_flight) < self._window:
                    photo = next(more, None)
                    if photo is None:
                        break
                    task = FileTask(photo, self.spec, self._settings, self._store)
                    in_flight.add(self._scheduler.submit(self._queue, task, inf, done.put))
                if not in_flight:
                    break
                job = done.get()
                in_flight.discard(job)
                record = _record(job)
                if isinstance(record, Record):
                    yield record
                else:
                    fatal = fatal or record
        finally:
            for job in in_flight:
                self._scheduler.cancel(job)
        if fatal is not None:
            raise fatal

    def _with_views(self, runtime: Runtime) -> Runtime:
        return with_views(runtime, self._settings, self.plan.batch)


@dataclass(eq=False)
class FileTask:
    """One photo: read and fitted, and its outputs written."""

    photo: Photo
    spec: Spec
    settings: PredictSettings
    store: Store
    decoded: bool = False
    """Whether errors from now on are the network's or the output's."""
    sha256: str = ""
    size: tuple[int, int] = (0, 0)
    picture: Pixels | None = None
    """The photo itself, where an output needs it."""

    def prepare(self) -> Pixels:
        """uint8 [1, h, w, 3]. Raises UserError if it can't be read or is too small."""
        content = read_bytes(self.photo.path, self.photo.bytes)
        self.sha256 = hashlib.sha256(content).hexdigest()
        most = round(self.settings.max_megapixels * 1e6)
        picture = decode_photo(content, self.photo.path, most)
        self.size = (picture.shape[0], picture.shape[1])
        fitted = fit(picture, self.spec)
        self.picture = picture if needs_picture(self.settings) else None
        self.decoded = True
        return fitted[None]

    def finish(self, result: npt.NDArray[Any], /) -> Record:
        """Writes the outputs, from labels uint8 [1, h, w] or logits float32 [1, K, h, w]. Raises
        UserError, of which OutputError concerns all photos."""
        rendered = render(self.photo, self.picture, result[0], self.size, self.spec, self.settings)
        self.picture = None
        outputs = {}
        for path, content in rendered.files.items():
            self.store.write(path, content)
            outputs[path] = OutputFile(len(content), hashlib.sha256(content).hexdigest())
        return Record(self.photo, self.sha256, self.size, outputs, rendered.pixels)

    def skipped(self, error: UserError | MemoryError) -> Record:
        """The record of a photo that can't be used."""
        reason = str(error) or "not enough memory"
        return Record(self.photo, self.sha256, error=reason.removeprefix(f"{self.photo.path}: "))


def _record(job: WorkItem) -> Record | BaseException:
    """The photo's record, or the error that ends the job: it concerns more than this photo."""
    task = job.task
    assert isinstance(task, FileTask)
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
        return error  # e.g. a label that is no class: the next photo would fail, too
    return replace(task.skipped(error), times=times)


def read_bytes(path: str, listed: int = 0) -> bytes:
    """The content of the file at `path`, a local path or a URL. listed: bytes that it had when it
    was listed, if known, which saves asking a remote file system.

    Folders, fifos and devices are refused without waiting. Raises UserError: the path, a
    colon and a few words.
    """
    place = local_path(path) if is_url(path) else path
    return _read_remote(path, listed) if place is None else _read_local(place, path)


def _read_local(place: str, path: str) -> bytes:
    try:
        # Opening a device may trigger it, and opening a fifo waits: refuse both before.
        _check(path, os.stat(place))
        handle = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        with open(handle, "rb", buffering=0) as file:
            _check(path, os.fstat(handle))
            return file.read()
    except ValueError as error:  # a NUL, or text that is no name on any file system
        raise UserError(f"{path}: no name that a file can have") from error
    except OSError as error:
        raise UserError(f"{path}: {_reason(error)}") from error


def _check(path: str, found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise UserError(f"{path}: is a folder")
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path}: not an ordinary file")
    if found.st_size > MAX_BYTES:
        raise UserError(f"{path}: {found.st_size / 1e9:.1f} GB is too large for a photo")


def _reason(error: OSError) -> str:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "no such file"
    if isinstance(error, PermissionError):
        return "no permission to read it: check its owner and mode"
    if error.errno == errno.ELOOP:
        return "its links lead in a circle"
    return f"can't be read ({error.strerror or error})"


def _read_remote(url: str, listed: int) -> bytes:
    system, path = file_system_of(url)
    try:
        size = listed
        if not size:
            found = system.info(path)
            if found.get("type") == "directory":
                raise IsADirectoryError(path)
            size = found.get("size") or 0
        if size > MAX_BYTES:
            raise UserError(f"{url}: {size / 1e9:.1f} GB is too large for a photo")
        return bytes(system.cat_file(path))
    except (UserError, MemoryError):
        raise
    except IsADirectoryError as error:
        raise UserError(f"{url}: is a folder") from error
    except Exception as error:  # see explain_remote_error
        raise UserError(f"{url}: {explain_remote_error(error)}") from error
