"""A server's configuration and limits. Worker processes get it as JSON."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from srdeploy.errors import UserError
from srdeploy.files import read_text
from srdeploy.serve.scheduling.planner import ModelSource, PlanConstraints, SessionPlan
from srdeploy.spec import Spec
from srdeploy.validation import Settings

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MIN_KEY_LENGTH = 16
KEY_VARIABLE = "SRDEPLOY_API_KEY"


class ServerLimits(Settings):
    """What one request, and all of them together, may ask for. Each limit is a flag of `srdeploy
    serve`."""

    body_mib: float = Field(default=32, gt=0)
    """MiB of one request: less than two photos of 4000x3000 as raw tensors, but many as JPEG."""
    megapixels: float = Field(default=50.0, gt=0)
    """Million pixels of one photo: what large phone cameras make. Checked in the header, before the
    pixels are decoded, so that a small file can't ask for much memory."""
    network_megapixels: float = Field(default=4.2, gt=0)
    """Million pixels of one image as the network sees it: 2048x2048. A model's own largest size is
    always allowed. Networks need hundreds of bytes of memory per pixel."""
    images: int = Field(default=16, ge=1)
    """Images in one request."""
    waiting: int = Field(default=64, ge=1)
    """Requests in flight, from the first byte to the answer; more are refused."""
    waiting_mib: float = Field(default=256, gt=0)
    """MiB of the bodies of all requests in flight."""
    timeout_s: float = Field(default=30.0, gt=0)
    """Seconds from the first byte to the answer. A client may ask for less."""
    drain_s: float = Field(default=1.0, ge=0)
    """Seconds after SIGTERM in which requests are still accepted, while load balancers turn
    away."""

    @property
    def body_bytes(self) -> int:
        """Bytes of one request."""
        return int(self.body_mib * 2**20)

    @property
    def waiting_bytes(self) -> int:
        """Bytes of the bodies of all requests in flight."""
        return int(self.waiting_mib * 2**20)

    @property
    def pixels(self) -> int:
        """Pixels of one photo."""
        return int(self.megapixels * 1e6)

    def network_pixels(self, spec: Spec) -> int:
        """Pixels of one image as the network of that spec sees it."""
        height, width = spec.input.largest
        return max(int(self.network_megapixels * 1e6), height * width)


class ServerConfig(Settings):
    """One server: its models, address, API key, limits and processes."""

    sources: tuple[ModelSource, ...] = Field(min_length=1)
    host: str = LOOPBACK[0]
    port: int = Field(default=8000, ge=0, le=65535)
    api_key: str | None = None
    limits: ServerLimits = ServerLimits()
    cores: int = Field(ge=1)
    """CPU cores that one process may use."""
    constraints: PlanConstraints = PlanConstraints()
    plans: dict[str, SessionPlan] = {}
    """Plans of models whose sessions are planned already."""
    samples: Path | None = None
    log: Literal["text", "json"] = "text"
    quiet: bool = False
    workers: int = Field(default=1, ge=1)
    """Worker processes."""

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in LOOPBACK


def name_sources(texts: Sequence[str]) -> list[tuple[str, Path]]:
    """(name, path) from PATH or NAME=PATH; the name of a PATH is its last part without suffix.

    Raises UserError for names that can't be part of a URL, and for duplicates.
    """
    named: list[tuple[str, Path]] = []
    for text in texts:
        given, equals, rest = text.partition("=")
        path = Path(rest if equals and not Path(text).exists() else text)
        name = given if path != Path(text) else path.resolve().stem
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise UserError(
                f"'{name}' can't be a model's name in a URL (letters, digits and ._- can): "
                f"give one, e.g. night={path}"
            )
        if any(name == other for other, _ in named):
            raise UserError(
                f"two models named '{name}': give one another name, e.g. {name}-2={path}"
            )
        named.append((name, path))
    return named


def find_api_key(file: Path | None, variable: str | None, host: str) -> str | None:
    """The API key from its file, or from the value of the environment variable.

    Raises UserError if it is too short, or missing while other machines can reach `host`.
    """
    key = read_text(file).strip() if file is not None else (variable or "").strip()
    where = str(file) if file is not None else KEY_VARIABLE
    if key:
        if len(key) < MIN_KEY_LENGTH or not key.isascii() or not key.isprintable():
            raise UserError(
                f"{where}: an API key has {MIN_KEY_LENGTH} or more printable ASCII characters, "
                "e.g. from openssl rand -hex 32"
            )
        return key
    if file is not None:
        raise UserError(f"{file} is empty: an API key is needed, e.g. from openssl rand -hex 32")
    if host not in LOOPBACK:
        raise UserError(
            f"--host {host} lets other machines in: an API key is needed, with --api-key-file FILE "
            f"or in {KEY_VARIABLE}; or leave --host out to serve only this machine"
        )
    return None
