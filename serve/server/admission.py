"""Which requests are served: admission control, and the refusals of all others."""

from math import ceil

from srdeploy.errors import UserError
from srdeploy.serve.server.config import ServerLimits

RETRY_AFTER_S = 1
"""A full queue is worked off within seconds."""


class Refusal(UserError):
    """A request that is not served. The answer is `status` with {"error": the message}."""

    status = 400

    def __init__(self, message: str, retry_after: int | None = None) -> None:
        super().__init__(" ".join(message.split()))
        self.retry_after = retry_after
        """Seconds after which a retry may succeed; None: none will."""


class BadRequest(Refusal):
    """The request is invalid, whenever it is sent."""


class Unauthorized(Refusal):
    """The API key is missing or wrong."""

    status = 401


class Forbidden(Refusal):
    """The request comes from another site's page."""

    status = 403


class NotFound(Refusal):
    """There is no such model, version or sample."""

    status = 404


class TooLarge(Refusal):
    """The request has more bytes, pixels or images than the limits allow."""

    status = 413


class UnsupportedMedia(Refusal):
    """The body has a type that is not read here."""

    status = 415


class Unavailable(Refusal):
    """The server is full, starting or stopping. It says so at once."""

    status = 503


class DeadlineExceeded(Refusal):
    """The deadline passed before the answer was there."""

    status = 504


class AdmissionControl:
    """Counts requests in flight and their bytes, and refuses more than the limits allow. Used only
    on the event loop's thread."""

    def __init__(self, limits: ServerLimits) -> None:
        self._limits = limits
        self.requests = 0
        self.bytes = 0

    def enter(self) -> None:
        """Admits a request. Raises Unavailable at the limit."""
        if self.requests >= self._limits.waiting:
            raise Unavailable(
                f"{self.requests} requests are in flight, the limit of this server: try again",
                retry_after=RETRY_AFTER_S,
            )
        self.requests += 1

    def check_length(self, count: int) -> None:
        """Raises TooLarge if a body of `count` bytes is over the limit."""
        if count > self._limits.body_bytes:
            raise TooLarge(
                f"the body is larger than {self._limits.body_mib:g} MiB: send less at once"
            )

    def grow(self, count: int, received: int) -> None:
        """Adds `count` bytes of a request, after `received`. Raises TooLarge and Unavailable."""
        self.check_length(received + count)
        if self.bytes + count > self._limits.waiting_bytes:
            raise Unavailable(
                f"requests of {ceil(self.bytes / 2**20)} MiB are in flight: try again",
                retry_after=RETRY_AFTER_S,
            )
        self.bytes += count

    def leave(self, count: int) -> None:
        """Releases a request of `count` bytes, which is answered."""
        self.requests -= 1
        self.bytes -= count
