"""Batches of photos for Ray Data, one by one as they are wanted: a million photos are never in
memory, and a job that is told to stop stops."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pyarrow
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.util.queue import Queue


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
