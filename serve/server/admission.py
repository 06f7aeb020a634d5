"""How much one request, and all of them together, may ask for. Each limit is a flag of `srdeploy
serve`."""

from math import ceil

from pydantic import Field

from srdeploy.errors import UserError
from srdeploy.spec import Spec
from srdeploy.validation import Settings

MAX_BODY_MIB = 32
"""Of one request, in MiB: two photos of 4000x3000 as raw tensors would not fit, as JPEG many do."""
MAX_MEGAPIXELS = 50.0
"""Of one photo, in millions: what large phone cameras make. Read from the header, before the pixels
are decoded, so that a small file can't ask for much memory."""
MAX_NETWORK_MEGAPIXELS = 4.2
"""Of one image as the network sees it, in millions: 2048x2048. A model whose own largest size has
more pixels takes those. Networks need hundreds of bytes of memory for each pixel."""
MAX_IMAGES = 16
"""Of one request."""
MAX_WAITING = 64
"""Requests that are taken in at once, from the first byte to the answer; more are refused."""
MAX_WAITING_MIB = 256
"""Bodies of the requests taken in, together, in MiB."""
TIMEOUT_S = 30.0
"""From the first byte to the answer. A client may ask for less."""
DRAIN_S = 1.0
"""After SIGTERM, how long connections are still taken while load balancers turn away."""


class Limits(Settings):
    """The limits of one server."""

    body_mib: float = Field(default=MAX_BODY_MIB, gt=0)
    megapixels: float = Field(default=MAX_MEGAPIXELS, gt=0)
    network_megapixels: float = Field(default=MAX_NETWORK_MEGAPIXELS, gt=0)
    images: int = Field(default=MAX_IMAGES, ge=1)
    waiting: int = Field(default=MAX_WAITING, ge=1)
    waiting_mib: float = Field(default=MAX_WAITING_MIB, gt=0)
    timeout_s: float = Field(default=TIMEOUT_S, gt=0)
    drain_s: float = Field(default=DRAIN_S, ge=0)

    @property
    def body_bytes(self) -> int:
        """Of one request."""
        return int(self.body_mib * 2**20)

    @property
    def pixels(self) -> int:
        """Of one photo."""
        return int(self.megapixels * 1e6)

    def network_pixels(self, spec: Spec) -> int:
        """Of one image as that network sees it."""
        height, width = spec.input.largest
        return max(int(self.network_megapixels * 1e6), height * width)

    @property
    def waiting_bytes(self) -> int:
        """Of all requests taken in."""
        return int(self.waiting_mib * 2**20)


# Requests that are not served: each has its HTTP status, and one line that says why.


class Refusal(UserError):
    """The answer is `status` with {"error": the one line}."""

    status = 400

    def __init__(self, message: str, retry_after: int | None = None) -> None:
        super().__init__(" ".join(message.split()))
        self.retry_after = retry_after
        """Seconds after which another try may succeed; None: none will."""


class BadRequest(Refusal):
    """What was sent can't be used, whenever it is sent."""


class NotFound(Refusal):
    """No such model, version or sample."""

    status = 404


class TooLarge(Refusal):
    """More bytes, pixels or images than the limits allow."""

    status = 413


class Busy(Refusal):
    """The queue is full, the model is starting, or the server is stopping: at once, not later."""

    status = 503


class Expired(Refusal):
    """The deadline passed before the answer was there."""

    status = 504


class Unauthorized(Refusal):
    """The API key is absent or wrong."""

    status = 401


class Forbidden(Refusal):
    """A page of another site asks."""

    status = 403


class UnsupportedMedia(Refusal):
    """A form of body that is not read here."""

    status = 415


# How many requests are inside, and how many bytes: more are refused at once.


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
