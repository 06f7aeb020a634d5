"""Prediction by the processes of a Ray cluster.

Ray Data hands them batches of photos as they are wanted, restarts processes that die and repeats
their batches. The processes write the outputs themselves. A million photos are never in memory, and
a job that is told to stop stops.
"""

import os
import pickle
import secrets
import warnings
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from srdeploy.files import explain_os_error
from srdeploy.runtimes.base import parse_device
from srdeploy.serve.folders.ray_cluster import (
    Allocation,
    BatchActor,
    BatchResult,
    WorkerConfig,
    allocate,
    cluster,
)
from srdeploy.serve.folders.records import Photo, Record
from srdeploy.serve.folders.settings import PredictSettings
from srdeploy.serve.folders.stores import OutputError
from srdeploy.serve.scheduling.planner import ModelSource

MOST_IN_BATCH = 64
"""Photos that are handed over at once: few enough that their records come soon, many enough that
the handing over costs nothing."""
BATCHES = 4
"""Batches of each actor, at least, if there are few photos: so that all end together."""
IN_FLIGHT = 2
"""Batches that an actor works on at once."""
AHEAD = 1
"""Further batches, for each actor, that wait for it in the cluster."""
RETRIES = 2
"""How often a batch is repeated when the process dies that has it, before its photos are tried one
by one."""
MOST_DEATHS = 3
"""Photos in a row that seem to kill the process, after which the cause is not the photos."""


class RayExecutor:
    """An existing cluster, or one that is started on this machine. See `predict.Executor`."""

    name = "ray"

    def __init__(
        self,
        threads: int | None = None,
        batch: int | None = None,
        address: str | None = None,
        actors: int | None = None,
    ) -> None:
        """threads: of each session; batch: photos in one run; address: "auto" or HOST:PORT, None: a
        cluster of this machine only; actors: processes that hold the network, None: as many as
        there are GPUs or machines."""
        self.sessions = 0
        self.threads = threads
        self.batch = batch or 1
        self._options = threads, batch
        self._address = address
        self._actors = actors
        self._in_flight: dict[int, Sequence[Photo]] = {}
        self._numbers = count()

    def records(
        self,
        source: ModelSource,
        photos: Iterator[Photo],
        expected: int,
        out: str,
        settings: PredictSettings,
    ) -> Generator[Record]:
        """The record of each photo, as the batches are done. A photo with which a process died
        `RETRIES` + 1 times has a record that says so.

        What ends the job is raised after the records of all in-flight photos. Raises UserError
        where there is no such cluster or the artifact can't be run, MissingPackageError without
        ray, and OutputError.
        """
        source = replace(source, path=Path(source.path).absolute())
        self._in_flight = {}
        # Each pass has its own cluster or connection: processes that Ray keeps restarting after a
        # failed pass would hold the cores that the next pass waits for.
        suspects: deque[Photo] = deque()
        deaths = 0
        with _marked(out) as mark:
            while True:
                one_by_one = bool(suspects)
                lost: list[Photo] = []
                with cluster(self._address):
                    allocation = allocate(self._actors, parse_device(source.device)[0] == "cuda")
                    config = self._config(source, expected, out, settings, mark, allocation)
                    size = max(1, min(MOST_IN_BATCH, expected // (BATCHES * allocation.actors)))
                    if one_by_one:
                        allocation = replace(allocation, actors=1)
                    batches = _one_by_one(suspects) if one_by_one else _batches(photos, size)
                    most = 1 if one_by_one else None
                    for record in self._run(config, allocation, batches, most, lost):
                        deaths = 0
                        yield record
                if len(lost) == 1:
                    deaths += 1
                    reason = "the process that worked on it died, several times"
                    yield Record(lost[0], error=reason)
                    photos = chain(tuple(suspects), photos)
                    suspects.clear()
                suspects.extend(lost if len(lost) > 1 else ())
                first = tuple(islice(photos, 0 if suspects else 1))
                if not suspects and not first:
                    return
                photos = chain(first, photos)
                if deaths >= MOST_DEATHS:
                    raise OutputError(
                        "the cluster's processes keep dying, whatever their photo: check their "
                        "memory, then run again"
                    )

    def _config(
        self,
        source: ModelSource,
        expected: int,
        out: str,
        settings: PredictSettings,
        mark: str | None,
        allocation: Allocation,
    ) -> WorkerConfig:
        return WorkerConfig(
            source=source,
            out=out if "://" in out else os.path.abspath(out),
            settings=settings,
            folder=os.getcwd(),
            mark=mark,
            photos=max(1, expected // allocation.actors),
            cores=allocation.cpus,
            threads=self._options[0],
            batch=self._options[1],
        )

    def _run(
        self,
        config: WorkerConfig,
        allocation: Allocation,
        batches: Iterator[Sequence[Photo]],
        most: int | None,
        lost: list[Photo],
    ) -> Iterator[Record]:
        """One run of Ray Data. most: batches in flight at once. lost: receives the photos that were
        in flight when processes died too often."""
        from ray.exceptions import RayError
        from ray.util.queue import Queue

        from srdeploy.serve.folders.ray_source import QueueSource

        failure: Exception | None = None
        try:
            queue = Queue(actor_options={"num_cpus": 0})
            open_ended = self._fill(queue, batches, most or allocation.actors * (IN_FLIGHT + AHEAD))
            for table in _dataset(QueueSource(queue), config, allocation).iter_batches(
                batch_size=None, batch_format="pyarrow", prefetch_batches=0
            ):
                for content in table["result"].to_pylist():
                    result: BatchResult = pickle.loads(content)
                    del self._in_flight[result.number]
                    self._note_plan(result, allocation)
                    if result.failure is not None and failure is None:
                        failure = result.failure.error()
                        batches = iter(())
                    yield from result.records
                    if open_ended:
                        open_ended = self._fill(queue, batches, 1)
        except RayError as error:
            if not self._in_flight:
                raise OutputError(f"Ray gave up: {type(error).__name__}; run again") from error
            lost.extend(chain.from_iterable(self._in_flight.values()))
            self._in_flight.clear()
        if failure is not None:
            raise failure

    def _fill(self, queue: Any, batches: Iterator[Sequence[Photo]], most: int) -> bool:
        """Hands over up to `most` more batches; whether there may be others after them."""
        for _ in range(most):
            batch = next(batches, None)
            if batch is None:
                queue.put(None)
                return False
            number = next(self._numbers)
            self._in_flight[number] = batch
            queue.put(pickle.dumps((number, batch)))
        return True

    def _note_plan(self, result: BatchResult, allocation: Allocation) -> None:
        """Notes how the network is run."""
        if result.plan is not None:
            self.sessions = allocation.actors * result.plan.shared.sessions
            self.threads = result.plan.shared.threads
            self.batch = result.plan.batch


def _dataset(feed: Any, config: WorkerConfig, allocation: Allocation) -> Any:
    """The Ray data set of results to what is in the queue."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 1  # bytes: each batch is passed on at once, by itself
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the limits to restarts and retries
        batches = ray.data.read_datasource(
            feed, num_cpus=0, override_num_blocks=1, ray_remote_args={"max_retries": 0}
        )
        return batches.map_batches(
            BatchActor,
            fn_constructor_args=(config,),
            batch_size=1,
            batch_format="pyarrow",
            zero_copy_batch=True,
            compute=ray.data.ActorPoolStrategy(
                size=allocation.actors,
                max_tasks_in_flight_per_actor=IN_FLIGHT,
                max_concurrent_calls_per_actor=IN_FLIGHT,
                enable_true_multi_threading=True,
            ),
            num_cpus=allocation.cpus,
            num_gpus=allocation.gpus or None,
            max_restarts=-1,
            max_task_retries=RETRIES,
        )


def _batches(photos: Iterator[Photo], size: int) -> Iterator[Sequence[Photo]]:
    while batch := tuple(islice(photos, size)):
        yield batch


def _one_by_one(photos: deque[Photo]) -> Iterator[Sequence[Photo]]:
    """Removes the photos, one by one."""
    while photos:
        yield (photos.popleft(),)


@contextmanager
def _marked(out: str) -> Iterator[str | None]:
    """Writes a file into a local output folder, by which other machines check that theirs is the
    same; a later run removes leftovers of that name."""
    if "://" in out:
        yield None
        return
    mark = Path(out).absolute() / f".cluster.{secrets.token_hex(4)}.part"
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError as error:
        raise OutputError(str(explain_os_error(error, out))) from error
    try:
        yield str(mark)
    finally:
        mark.unlink(missing_ok=True)
