"""Batches of photos for Ray Data, one by one as they are wanted: a million photos are never in
memory, and a job that is told to stop stops."""

import os
import pickle
import secrets
import warnings
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import pyarrow
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.util.queue import Queue

from srdeploy.files import explain_os_error
from srdeploy.runtimes.base import parse_device
from srdeploy.serve.folders.ray_cluster import Answer, BatchActor, Order, Share, cluster, share
from srdeploy.serve.folders.records import Photo, Record
from srdeploy.serve.folders.settings import PredictSettings
from srdeploy.serve.folders.stores import OutputError
from srdeploy.serve.scheduling.planner import ModelSource


class Feed(Datasource):
    """What is put into a queue, until None is: blocks of one row, column `batch`."""

    def __init__(self, queue: Queue) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Ray says no types of it
        self._queue = queue

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown."""
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """The one task that takes from the queue."""
        nothing_known = BlockMetadata(
            num_rows=None, size_bytes=None, input_files=None, exec_stats=None
        )
        return [ReadTask(partial(_blocks, self._queue), nothing_known)]


def _blocks(queue: Queue) -> Iterator[pyarrow.Table]:
    while (batch := queue.get()) is not None:
        yield pyarrow.table({"batch": pyarrow.array([batch], pyarrow.binary())})


# Prediction by the processes of a Ray cluster: Ray Data hands them batches of photos, restarts
# those that die and repeats their batches. Outputs are written by the processes themselves.

MOST_IN_BATCH = 64
"""Photos that are handed over at once: few enough that their records come soon, many enough that
the handing over costs nothing."""
BATCHES = 4
"""Batches of each actor, at least, where there are few photos: so that all end together."""
IN_FLIGHT = 2
"""Batches that an actor works on at once."""
AHEAD = 1
"""Further batches, for each actor, that wait for it in the cluster."""
RETRIES = 2
"""How often a batch is repeated when the process dies that has it, before its photos are tried one
by one."""
MOST_DEATHS = 3
"""Photos in a row that seem to kill the process, after which it is not the photos."""


class RayEngine:
    """A cluster, or one that is started on this machine. See `engine.Engine`."""

    name = "ray"

    def __init__(
        self,
        threads: int | None = None,
        batch: int | None = None,
        address: str | None = None,
        actors: int | None = None,
    ) -> None:
        """threads: of each session; batch: photos in one run; address: "auto" or HOST:PORT, None: a
        cluster of this machine alone; actors: processes that hold the network, None: as many as
        there are GPUs or machines."""
        self.sessions = 0
        self.threads = threads
        self.batch = batch or 1
        self._wishes = threads, batch
        self._address = address
        self._actors = actors
        self._under_way: dict[int, Sequence[Photo]] = {}
        self._numbers = count()

    def records(
        self,
        source: ModelSource,
        photos: Iterator[Photo],
        expected: int,
        out: str,
        settings: PredictSettings,
    ) -> Generator[Record]:
        """What became of each photo, as their batches are done. A photo with which a process died
        `RETRIES` + 1 times has a record that says so.

        What ends the job is raised after the records of all that was under way. Raises UserError
        where there is no such cluster or the artifact can't be run, MissingPackageError without
        ray, and OutputError.
        """
        source = replace(source, path=Path(source.path).absolute())
        self._under_way = {}
        # Each pass has a cluster, or a connection with it, of its own: processes that Ray goes on
        # restarting after a pass that failed would keep the next one's waiting for their cores.
        suspects: deque[Photo] = deque()
        deaths = 0
        with _marked(out) as mark:
            while True:
                alone = bool(suspects)
                lost: list[Photo] = []
                with cluster(self._address):
                    spread = share(self._actors, parse_device(source.device)[0] == "cuda")
                    order = self._order(source, expected, out, settings, mark, spread)
                    size = max(1, min(MOST_IN_BATCH, expected // (BATCHES * spread.actors)))
                    if alone:
                        spread = replace(spread, actors=1)
                    batches = _alone(suspects) if alone else _batches(photos, size)
                    for record in self._run(order, spread, batches, 1 if alone else None, lost):
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
                        "the cluster's processes keep dying, whatever their photo: see to their "
                        "memory, then run again"
                    )

    def _order(
        self,
        source: ModelSource,
        expected: int,
        out: str,
        settings: PredictSettings,
        mark: str | None,
        spread: Share,
    ) -> Order:
        return Order(
            source=source,
            out=out if "://" in out else os.path.abspath(out),
            settings=settings,
            folder=os.getcwd(),
            mark=mark,
            photos=max(1, expected // spread.actors),
            cores=spread.cpus,
            threads=self._wishes[0],
            batch=self._wishes[1],
        )

    def _run(
        self,
        order: Order,
        spread: Share,
        batches: Iterator[Sequence[Photo]],
        most: int | None,
        lost: list[Photo],
    ) -> Iterator[Record]:
        """One run of Ray Data. most: batches under way at once. lost: takes the photos that were
        under way where processes died too often."""
        from ray.exceptions import RayError
        from ray.util.queue import Queue

        failure: Exception | None = None
        try:
            queue = Queue(actor_options={"num_cpus": 0})
            open_ended = self._fill(queue, batches, most or spread.actors * (IN_FLIGHT + AHEAD))
            for table in _dataset(Feed(queue), order, spread).iter_batches(
                batch_size=None, batch_format="pyarrow", prefetch_batches=0
            ):
                for content in table["answer"].to_pylist():
                    answer: Answer = pickle.loads(content)
                    del self._under_way[answer.number]
                    self._learn(answer, spread)
                    if answer.failure is not None and failure is None:
                        failure = answer.failure.error()
                        batches = iter(())
                    yield from answer.records
                    if open_ended:
                        open_ended = self._fill(queue, batches, 1)
        except RayError as error:
            if not self._under_way:
                raise OutputError(f"Ray gave up: {type(error).__name__}; run again") from error
            lost.extend(chain.from_iterable(self._under_way.values()))
            self._under_way.clear()
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
            self._under_way[number] = batch
            queue.put(pickle.dumps((number, batch)))
        return True

    def _learn(self, answer: Answer, spread: Share) -> None:
        """How the network is run."""
        if answer.plan is not None:
            self.sessions = spread.actors * answer.plan.shared.sessions
            self.threads = answer.plan.shared.threads
            self.batch = answer.plan.batch


def _dataset(feed: Any, order: Order, spread: Share) -> Any:
    """The Ray data set of answers to what is in the queue."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 1  # bytes: each batch goes on at once, by itself
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the limits to restarts and retries
        batches = ray.data.read_datasource(
            feed, num_cpus=0, override_num_blocks=1, ray_remote_args={"max_retries": 0}
        )
        return batches.map_batches(
            BatchActor,
            fn_constructor_args=(order,),
            batch_size=1,
            batch_format="pyarrow",
            zero_copy_batch=True,
            compute=ray.data.ActorPoolStrategy(
                size=spread.actors,
                max_tasks_in_flight_per_actor=IN_FLIGHT,
                max_concurrent_calls_per_actor=IN_FLIGHT,
                enable_true_multi_threading=True,
            ),
            num_cpus=spread.cpus,
            num_gpus=spread.gpus or None,
            max_restarts=-1,
            max_task_retries=RETRIES,
        )


def _batches(photos: Iterator[Photo], size: int) -> Iterator[Sequence[Photo]]:
    while batch := tuple(islice(photos, size)):
        yield batch


def _alone(photos: deque[Photo]) -> Iterator[Sequence[Photo]]:
    """Takes them away, one by one."""
    while photos:
        yield (photos.popleft(),)


@contextmanager
def _marked(out: str) -> Iterator[str | None]:
    """Lays a file into a local output folder by which other machines tell whether theirs is the
    same; its name is one that a later run clears away."""
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
