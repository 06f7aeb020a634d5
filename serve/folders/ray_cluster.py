"""A Ray cluster: joining or starting it, dividing it, and the process that works there."""

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

if TYPE_CHECKING:
    import pyarrow

OBJECT_STORE_BYTES = 100 << 20
"""Only names and records of photos go through it, not photos or masks."""


@dataclass(frozen=True)
class Allocation:
    """How a job is divided over a cluster."""

    actors: int
    cpus: int
    """CPU cores of each actor."""
    gpus: int
    """GPUs of each actor."""


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
        _check_reachable(address)
    # The last output of a killed process would go to stdout, whatever log_to_driver is.
    ray._private.worker._worker_logs_enabled = False
    with _signals_restored(), _stderr_silenced():
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
        with _stderr_silenced():
            ray.shutdown()


def allocate(actors: int | None, on_gpu: bool) -> Allocation:
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
        return Allocation(min(actors or gpus, gpus), max(1, cpus), 1)
    smallest = min(int(node["CPU"]) for node in able)
    if actors is None:
        return Allocation(sum(int(node["CPU"]) // smallest for node in able), smallest, 0)
    cores = sum(int(node["CPU"]) for node in able)
    actors = min(actors, cores)
    return Allocation(actors, max(1, min(smallest, cores // actors)), 0)


def _check_reachable(address: str) -> None:
    """Ray itself waits for minutes, and ends the process where nobody results."""
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
def _signals_restored() -> Iterator[None]:
    """Ray installs its own SIGTERM handler, but SIGTERM must end the job."""
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
def _stderr_silenced() -> Iterator[None]:
    """The C++ side of Ray writes to file descriptor 2, whatever the log level."""
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


# The process that holds the network and works on batches of photos.


@dataclass(frozen=True)
class Failure:
    """Why the job ends, as text: exceptions of libraries may not survive pickling."""

    kind: Literal["output", "user", "fault"]
    message: str

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        """A failure made from an exception; a bug keeps its traceback."""
        if isinstance(error, OutputError):
            return cls("output", str(error))
        if isinstance(error, UserError):
            return cls("user", str(error))
        return cls("fault", "".join(traceback.format_exception(error)))

    def error(self) -> Exception:
        """The exception to raise in the driver process."""
        if self.kind == "output":
            return OutputError(self.message)
        if self.kind == "user":
            return UserError(self.message)
        return RuntimeError(f"in a process of the cluster:\n{self.message}")


@dataclass(frozen=True)
class BatchResult:
    """The records of a batch."""

    number: int
    records: Sequence[Record]
    failure: Failure | None
    plan: SessionPlan | None
    """None where the network could not be loaded."""


@dataclass(frozen=True)
class WorkerConfig:
    """What all processes of a job need to know."""

    source: ModelSource
    """The artifact, with an absolute path."""
    out: str
    """An absolute path or a URL."""
    settings: PredictSettings
    folder: str
    """The folder that relative paths of photos refer to."""
    mark: str | None
    """A file below `out` that exists while the job runs; None if `out` is a URL."""
    photos: int
    """Photos of each process, roughly."""
    cores: int
    """CPU cores of each process."""
    threads: int | None
    batch: int | None


class BatchActor:
    """Ray makes one in each of its processes; two of its threads then hand it batches, so that the
    second one's photos are decoded while the first one's last masks are written."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._stack = ExitStack()
        self._worker: Worker | None = None
        self._relative = True

    def __call__(self, table: "pyarrow.Table") -> "pyarrow.Table":
        """Column `batch` of pickled (number, photos) -> column `result` of pickled BatchResult."""
        import pyarrow

        results = [self._result(*pickle.loads(batch)) for batch in table["batch"].to_pylist()]
        content = [pickle.dumps(result) for result in results]
        return pyarrow.table({"result": pyarrow.array(content, pyarrow.binary())})

    def _result(self, number: int, photos: Sequence[Photo]) -> BatchResult:
        records: list[Record] = []
        failure = None
        try:
            worker = self._open()
            if not self._relative and not all(_is_absolute(photo.path) for photo in photos):
                raise UserError(
                    f"{self._config.folder} is not there on {socket.gethostname()}, a machine of "
                    "the cluster: give the photos as absolute paths or URLs that all machines have"
                )
            for record in worker.records(photos):
                records.append(record)
        except Exception as error:
            failure = Failure.of(error)
        return BatchResult(number, records, failure, self._worker.plan if self._worker else None)

    def _open(self) -> Worker:
        """Loads the network with the first batch: were it done in __init__, an error would make
        Ray start the process again and again."""
        config = self._config
        with self._lock:
            if self._worker is None:
                ignore_pillow_warnings()
                try:
                    os.chdir(config.folder)
                except OSError:
                    self._relative = False
                if config.mark is not None and not os.path.exists(config.mark):
                    raise UserError(
                        f"{config.out} is another folder on {socket.gethostname()}, a machine of "
                        "the cluster: give one that all machines share, or a URL"
                    )
                source = config.source
                if parse_device(source.device)[0] == "cuda":
                    source = replace(source, device="cuda")  # Ray shows each process its own GPU
                plan = folder_plan(
                    source, config.photos, config.threads, config.batch, config.cores
                )
                store = open_store(config.out)
                worker = Worker(source, plan, config.settings, store, config.cores)
                self._worker = self._stack.enter_context(worker)
            return self._worker


def _is_absolute(path: str) -> bool:
    """Whether a path means the same in every folder."""
    return os.path.isabs(path) or "://" in path
