"""Jobs of one model that are decoded and wait for one of its lanes."""

from collections import deque
from itertools import islice
from threading import Condition, Lock

from srdeploy.serve.scheduling.job import Job


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
