"""How much one request, and all of them together, may ask for. Each limit is a flag of `srdeploy
serve`."""

from pydantic import Field

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
