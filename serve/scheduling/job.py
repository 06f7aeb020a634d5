"""One task under way: where it stands, when it must be done, and how long each step took."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from srdeploy.errors import UserError
from srdeploy.imaging import Pixels
from srdeploy.serve.scheduling.task import Task

STEPS = ("decode", "wait", "compute", "encode")
"""The steps of a job, as Timing names them."""


class DeadlineError(UserError):
    """The job's deadline passed before it was done."""


@dataclass
class Timing:
    """Milliseconds of one job's steps, and how many images its run held."""

    decode: float = 0.0
    wait: float = 0.0
    """For a codec thread, and then for a model's thread."""
    compute: float = 0.0
    """Of the whole run, which other jobs may have shared."""
    encode: float = 0.0
    batch: int = 0


@dataclass(eq=False)
class Job:
    """Made by Scheduler.submit, handed from thread to thread; one thread has it at a time."""

    task: Task[Any]
    deadline: float
    """On time.monotonic's clock."""
    done: Callable[["Job"], None]
    """Called once, on some thread, when `answer` or `error` is set; never after a cancellation."""
    timing: Timing = field(default_factory=Timing)
    images: Pixels | None = None
    result: npt.NDArray[Any] | None = None
    answer: Any = None
    error: BaseException | None = None
    cancelled: bool = False
    since: float = field(default_factory=time.monotonic)
    """When its present wait began."""

    def begin_wait(self) -> None:
        """From now on it waits for a thread."""
        self.since = time.monotonic()

    def end_wait(self) -> float:
        """Now a thread has it: the moment, for the step's own time."""
        now = time.monotonic()
        self.timing.wait += 1000 * (now - self.since)
        return now

    @property
    def size(self) -> int:
        """N of its images, which are decoded."""
        assert self.images is not None
        return len(self.images)

    @property
    def late(self) -> bool:
        """Whether its deadline has passed."""
        return time.monotonic() > self.deadline
