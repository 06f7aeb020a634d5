"""A connection to a Ray cluster, or one of its own on this machine, that keeps quiet."""

import logging
import os
import pickle
import signal
import socket
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from srdeploy.environment import usable_cores
from srdeploy.errors import MissingPackageError, UserError
from srdeploy.imaging import ignore_pillow_warnings
from srdeploy.runtimes.base import parse_device
from srdeploy.serve.folders.records import Photo, Record
from srdeploy.serve.folders.settings import PredictSettings
from srdeploy.serve.folders.stores import OutputError, open_store
from srdeploy.serve.folders.worker import Worker, folder_plan
from srdeploy.serve.scheduling.planner import ModelSource, SessionPlan

OBJECT_STORE_BYTES = 100 << 20
"""Photos and masks do not go through it, only their names and records."""


@dataclass(frozen=True)
class Share:
    """How a job is spread over a cluster."""

    actors: int
    cpus: int
    """Of each actor."""
    gpus: int
    """Of each actor."""


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Connects with the cluster at `address` ("auto", HOST:PORT, ray://...); None: starts one on
    this machine with the cores that this process may use, and ends it again.

    A connection that the process has already is taken and kept. Raises UserError where there is no
    such cluster, MissingPackageError without ray.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingPackageError("ray", "ray", "--engine ray") from error
    if ray.is_initialized():
        yield
        return
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    if address is not None:
        _knock(address)
    # What a killed process leaves to say goes to stdout, whatever log_to_driver is.
    ray._private.worker._worker_logs_enabled = False
    with _signals_kept(), _stderr_shut():
        try:
            if address is None:
                ray.init(
                    address="local",
                    num_cpus=usable_cores(),
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    log_to_driver=False,
                    logging_level=logging.CRITICAL,
                )
            else:
                ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
        except (ConnectionError, OSError, ValueError, RuntimeError) as error:
            if address is None:
                raise UserError(f"Ray can't start on this machine: {_first_line(error)}") from error
            raise UserError(
                f"the Ray cluster at {address} can't be joined ({_first_line(error)}): see that it "
                f"runs, with version {ray.__version__}, and that RAY_AUTH_TOKEN is its token if it "
                "has one"
            ) from error
    try:
        yield
    finally:
        with _stderr_shut():
            ray.shutdown()


def share(actors: int | None, on_gpu: bool) -> Share:
    """One actor for each GPU, or for each machine; or `actors` of them. Raises UserError where the
    cluster has no GPU and one is needed."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    kind = "GPU" if on_gpu else "CPU"
    able = [node for node in nodes if node.get(kind, 0) >= 1]
    if not able:
        raise UserError(f"no machine of the Ray cluster has a {kind}: give another --device")
    if on_gpu:
        gpus = sum(int(node["GPU"]) for node in able)
        cpus = min(int(node.get("CPU", 0) // node["GPU"]) for node in able)
        return Share(min(actors or gpus, gpus), max(1, cpus), 1)
    smallest = min(int(node["CPU"]) for node in able)
    if actors is None:
        return Share(sum(int(node["CPU"]) // smallest for node in able), smallest, 0)
    cores = sum(int(node["CPU"]) for node in able)
    actors = min(actors, cores)
    return Share(actors, max(1, min(smallest, cores // actors)), 0)


def _knock(address: str) -> None:
    """Ray itself waits for minutes, and ends the process where nobody answers."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(
            f"no Ray cluster answers at {address}: {error.strerror or error}"
        ) from error


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself, of which a job's end is to be asked."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _stderr_shut() -> Iterator[None]:
    """Ray's C++ side says on file descriptor 2 how much it is going to say there."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# A process of a Ray cluster that holds the network and works on batches of photos.

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
    plan: SessionPlan | None
    """None where the network could not be loaded."""


@dataclass(frozen=True)
class Order:
    """What all processes of a job do."""

    source: ModelSource
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
                ignore_pillow_warnings()
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
