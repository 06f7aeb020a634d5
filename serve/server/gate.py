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

    def enter(self) -> None:
        """Raises Busy where as many are inside as may be."""
        if self.requests >= self._limits.waiting:
            raise Busy(
                f"{self.requests} requests wait already, as many as this server takes in: try "
                "again",
                retry_after=RETRY_AFTER_S,
            )
        self.requests += 1

    def check_length(self, count: int) -> None:
        """Raises TooLarge where one body has more bytes than it may."""
        if count > self._limits.body_bytes:
            raise TooLarge(
                f"the body is larger than {self._limits.body_mib:g} MiB: send less at once"
            )

    def grow(self, count: int, so_far: int) -> None:
        """`count` more bytes of a request that had `so_far`. Raises TooLarge and Busy."""
        self.check_length(so_far + count)
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
