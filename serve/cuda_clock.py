"""Device time of phases of work on a stream, by CUDA events."""

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any, Self

from srdeploy.serve.cuda_runtime import Cuda


class DeviceClock:
    """Marks where phases begin on a stream. A context manager; read comes before it ends."""

    def __init__(self, cuda: Cuda, stream: int) -> None:
        self._cuda = cuda
        self._stream = stream
        self._events = ExitStack()
        self._marks: list[tuple[str | None, Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._events.close()

    def mark(self, phase: str | None) -> None:
        """What the stream is given from here on belongs to `phase`; None: to none."""
        event = self._cuda.record(self._stream)
        self._events.callback(self._cuda.free_event, event)
        self._marks.append((phase, event))

    def read(self, phases: Sequence[str]) -> dict[str, float]:
        """Milliseconds by phase, 0 where it was not marked; the stream must be idle."""
        times = dict.fromkeys(phases, 0.0)
        for (phase, start), (_, end) in pairwise(self._marks):
            if phase is not None:
                times[phase] += self._cuda.milliseconds(start, end)
        return times
