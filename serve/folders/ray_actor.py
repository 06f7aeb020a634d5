"""A process of a Ray cluster that holds the network and works on batches of photos."""

import os
import pickle
import socket
import threading
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from srdeploy.errors import UserError
from srdeploy.pillow_remarks import ignore_remarks
from srdeploy.serve.folders.local_store import open_store
from srdeploy.serve.folders.photo import Photo
from srdeploy.serve.folders.record import Record
from srdeploy.serve.folders.settings import PredictSettings
from srdeploy.serve.folders.store import OutputError
from srdeploy.serve.folders.worker import Worker, folder_plan
from srdeploy.serve.runtime import parse_device
from srdeploy.serve.scheduling.plan import Plan
from srdeploy.serve.scheduling.sessions import Source

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True)
class Failure:
    """What ends the job, in words: errors of libraries may not survive their journey."""

    kind: Literal["output", "user", "fault"]
    message: str

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        """A fault of ours keeps its traceback."""
        if isinstance(error, OutputError):
            return cls("output", str(error))
        if isinstance(error, UserError):
            return cls("user", str(error))
        return cls("fault", "".join(traceback.format_exception(error)))

    def error(self) -> Exception:
        """The error to raise where people see it."""
        if self.kind == "output":
            return OutputError(self.message)
        if self.kind == "user":
            return UserError(self.message)
        return RuntimeError(f"in a process of the cluster:\n{self.message}")


@dataclass(frozen=True)
class Answer:
    """What became of a batch."""

    number: int
    records: Sequence[Record]
    failure: Failure | None
    plan: Plan | None
    """None where the network could not be loaded."""


@dataclass(frozen=True)
class Order:
    """What all processes of a job do."""

    source: Source
    """With an absolute path."""
    out: str
    """An absolute path or a URL."""
    settings: PredictSettings
    folder: str
    """What relative paths of photos are relative to."""
    mark: str | None
    """A file below `out` that is there while the job runs; None where `out` is a URL."""
    photos: int
    """Of each process, roughly."""
    cores: int
    """Of each process."""
    threads: int | None
    batch: int | None


class BatchActor:
    """Ray makes one in each of its processes; two of its threads then hand it batches, so that the
    second one's photos are decoded while the first one's last masks are written."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._lock = threading.Lock()
        self._stack = ExitStack()
        self._worker: Worker | None = None
        self._relative = True

    def __call__(self, table: "pyarrow.Table") -> "pyarrow.Table":
        """Column `batch`, of pickled (number, photos), to column `answer`, of pickled `Answer`."""
        import pyarrow

        answers = [self._answer(*pickle.loads(batch)) for batch in table["batch"].to_pylist()]
        content = [pickle.dumps(answer) for answer in answers]
        return pyarrow.table({"answer": pyarrow.array(content, pyarrow.binary())})

    def _answer(self, number: int, photos: Sequence[Photo]) -> Answer:
        records: list[Record] = []
        failure = None
        try:
            worker = self._open()
            if not self._relative and not all(_anywhere(photo.path) for photo in photos):
                raise UserError(
                    f"{self._order.folder} is not there on {socket.gethostname()}, a machine of "
                    "the cluster: give the photos as absolute paths or URLs that all machines have"
                )
            for record in worker.records(photos):
                records.append(record)
        except Exception as error:
            failure = Failure.of(error)
        return Answer(number, records, failure, self._worker.plan if self._worker else None)

    def _open(self) -> Worker:
        """Loads the network with the first batch: were it done in __init__, an error would make
        Ray start the process again and again."""
        order = self._order
        with self._lock:
            if self._worker is None:
                ignore_remarks()
                try:
                    os.chdir(order.folder)
                except OSError:
                    self._relative = False
                if order.mark is not None and not os.path.exists(order.mark):
                    raise UserError(
                        f"{order.out} is another folder on {socket.gethostname()}, a machine of "
                        "the cluster: give one that all machines share, or a URL"
                    )
                source = order.source
                if parse_device(source.device)[0] == "cuda":
                    source = replace(source, device="cuda")  # Ray shows each process its own GPU
                plan = folder_plan(source, order.photos, order.threads, order.batch, order.cores)
                store = open_store(order.out)
                worker = Worker(source, plan, order.settings, store, order.cores)
                self._worker = self._stack.enter_context(worker)
            return self._worker


def _anywhere(path: str) -> bool:
    """Whether a path means the same in all folders."""
    return os.path.isabs(path) or "://" in path
