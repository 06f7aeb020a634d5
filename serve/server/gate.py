"""How many requests are inside, and how many bytes: more are refused at once."""

from math import ceil

from srdeploy.serve.server.limits import Limits
from srdeploy.serve.server.refusals import Busy, TooLarge


class Gate:
    """Counts what is inside. Used on the event loop's thread alone."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.requests = 0
        self.bytes = 0

    @property
    def full(self) -> bool:
        """Whether the next request would be refused, however small."""
        return self.requests >= self._limits.waiting

    def busy(self) -> Busy:
        """The refusal of one request too many."""
        return Busy(
            f"{self.requests} requests wait already, as many as this server takes in: try again",
            retry_after=RETRY_AFTER_S,
        )

    def enter(self) -> None:
        """Raises Busy where as many are inside as may be."""
        if self.full:
            raise self.busy()
        self.requests += 1

    def grow(self, count: int, so_far: int) -> None:
        """`count` more bytes of a request that had `so_far`. Raises TooLarge and Busy."""
        if so_far + count > self._limits.body_bytes:
            raise TooLarge(
                f"the body is larger than {self._limits.body_mib:g} MiB: send less at once"
            )
        if self.bytes + count > self._limits.waiting_bytes:
            raise Busy(
                f"requests of {ceil(self.bytes / 2**20)} MiB wait already: try again",
                retry_after=RETRY_AFTER_S,
            )
        self.bytes += count

    def leave(self, count: int) -> None:
        """One request with `count` bytes is answered."""
        self.requests -= 1
        self.bytes -= count


RETRY_AFTER_S = 1
"""A full queue is worked off within seconds."""
