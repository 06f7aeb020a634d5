"""Batches of photos as a data source of Ray: a module of its own, since its class inherits from
Ray, which not every machine has."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pyarrow
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.util.queue import Queue


class QueueSource(Datasource):
    """The items of a queue up to None, as blocks of one row with column `batch`."""

    def __init__(self, queue: Queue) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Ray has no types for it
        self._queue = queue

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown."""
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """The one task that reads the queue."""
        nothing_known = BlockMetadata(
            num_rows=None, size_bytes=None, input_files=None, exec_stats=None
        )
        return [ReadTask(partial(_blocks, self._queue), nothing_known)]


def _blocks(queue: Queue) -> Iterator[pyarrow.Table]:
    while (batch := queue.get()) is not None:
        yield pyarrow.table({"batch": pyarrow.array([batch], pyarrow.binary())})
