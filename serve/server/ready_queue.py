"""Jobs of one model that are decoded and wait for one of its lanes."""

from collections import deque
from threading import Condition, Lock

from srdeploy.serve.server.job import Job


class ReadyQueue:
    """What one model's lanes share. Whoever touches it holds the scheduler's lock."""

    def __init__(self, lock: Lock, ahead: int, cores: int) -> None:
        self.cores = cores
        """What a run takes of the process's cores; 0 where a GPU does the work."""
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
        self.idle = 0
        """How many of them wait there."""
        self.has_lone = False
        """Whether there is a lane for lone requests alone."""
        self._ahead = ahead

    @property
    def has_room(self) -> bool:
        """Whether another job may be decoded: decoded images are large, bodies are small."""
        return self.coming + len(self.jobs) < self._ahead

    @property
    def drained(self) -> bool:
        """Whether nothing is left, and nothing will come."""
        return self.closed and not (self.jobs or self.coming or self.arrived)

    def expects(self, most: int) -> bool:
        """Whether a run of `most` images would be fuller if it waited."""
        return bool(self.arrived or self.coming) and self._fitting(most)[1] < most

    def pop(self, most: int) -> list[Job]:
        """The first job, with those behind it that have its height and width, in their order;
        `most` images, or the first job's own where they are more."""
        count, _ = self._fitting(most)
        return [self.jobs.popleft() for _ in range(count)]

    def _fitting(self, most: int) -> tuple[int, int]:
        """How many jobs pop would give, and their images."""
        count = images = 0
        size = None
        for job in self.jobs:
            assert job.images is not None
            number, *shape = job.images.shape
            if count and (shape != size or images + number > most):
                break
            size = shape
            count += 1
            images += number
        return count, images
