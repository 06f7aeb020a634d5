"""The work of one image or tensor, in the three steps that the scheduler places."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from threading import Condition, Lock
from typing import Any, Generic, Protocol, TypeVar

import numpy.typing as npt

from srdeploy.errors import UserError
from srdeploy.imaging import Pixels

Answer_co = TypeVar("Answer_co", covariant=True)


class Task(Protocol, Generic[Answer_co]):
    """prepare and finish run on a codec thread, what lies between them on a model's thread.

    Both may raise a UserError, which is this task's alone.
    """

    def prepare(self) -> Pixels:
        """The images as the network takes them, uint8 [N, H, W, 3]."""

    def finish(self, result: npt.NDArray[Any], /) -> Answer_co:
        """The answer, from what the lane's run made of what prepare gave: labels uint8 [N, H, W],
        or logits float32 [N, K, H, W]."""


# One task under way: where it stands, when it must be done, and how long each step took.

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


# Jobs of one model that are decoded and wait for one of its lanes.


class ReadyQueue:
    """What one model's lanes share. Whoever touches it holds the scheduler's lock."""

    def __init__(self, lock: Lock, ahead: int) -> None:
        self.jobs: deque[Job] = deque()
        self.arrived = 0
        """Jobs that no codec thread has yet taken."""
        self.coming = 0
        """Jobs that are being decoded."""
        self.closed = False
        self.lone = Condition(lock)
        """Where the lane of lone requests waits."""
        self.shared = Condition(lock)
        """Where the other lanes wait."""
        self.has_lone = False
        """Whether there is a lane for lone requests alone."""
        self._ahead = ahead

    @property
    def waiting(self) -> int:
        """Jobs that have not been taken by a lane."""
        return self.arrived + self.coming + len(self.jobs)

    @property
    def room(self) -> int:
        """How many more jobs may be decoded: decoded images are large, bodies are small."""
        return self._ahead - self.coming - len(self.jobs)

    @property
    def drained(self) -> bool:
        """Whether nothing is left, and nothing will come."""
        return self.closed and not (self.jobs or self.coming or self.arrived)

    def expects(self, most: int) -> bool:
        """Whether a run of `most` images would be fuller if it waited."""
        if not (self.coming or (self.arrived and self.room > 0)):
            return False
        return sum(job.size for job in self._fitting(most)) < most

    def pop(self, most: int) -> list[Job]:
        """The first job, with others of its height and width from wherever they stand, in their
        order; `most` images, or the first job's own where they are more."""
        chosen = self._fitting(most)
        for job in chosen:
            self.jobs.remove(job)
        return chosen

    def _fitting(self, most: int) -> list[Job]:
        first = self.jobs[0]
        assert first.images is not None
        chosen, images = [first], first.size
        for job in islice(self.jobs, 1, None):
            assert job.images is not None
            if images + job.size > most:
                break
            if job.images.shape[1:] == first.images.shape[1:]:
                chosen.append(job)
                images += job.size
        return chosen
