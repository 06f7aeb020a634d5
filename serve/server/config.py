"""All that a server is started with; workers get it as JSON."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from srdeploy.errors import UserError
from srdeploy.files import read_text
from srdeploy.serve.scheduling.planner import Plan, Source, Wishes
from srdeploy.serve.server.admission import Limits
from srdeploy.validation import Settings

LOOPBACK = ("127.0.0.1", "localhost", "::1")
LEAST_KEY_LENGTH = 16
KEY_VARIABLE = "SRDEPLOY_API_KEY"


class ServerConfig(Settings):
    """One server. What it serves, how, to whom, and within which limits."""

    sources: tuple[Source, ...] = Field(min_length=1)
    host: str = LOOPBACK[0]
    port: int = Field(default=8000, ge=0, le=65535)
    api_key: str | None = None
    limits: Limits = Limits()
    cores: int = Field(ge=1)
    """CPU cores that one process may use."""
    wishes: Wishes = Wishes()
    plans: dict[str, Plan] = {}
    """Of models whose layout is known already."""
    samples: Path | None = None
    log: Literal["text", "json"] = "text"
    quiet: bool = False
    workers: int = Field(default=1, ge=1)

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host in LOOPBACK


def name_sources(texts: Sequence[str]) -> list[tuple[str, Path]]:
    """(name, path) from PATH or NAME=PATH; the name of a PATH is its last part without suffix.

    Raises UserError for names that can't stand in an address, or stand twice.
    """
    named: list[tuple[str, Path]] = []
    for text in texts:
        given, equals, rest = text.partition("=")
        path = Path(rest if equals and not Path(text).exists() else text)
        name = given if path != Path(text) else path.resolve().stem
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise UserError(
                f"'{name}' can't be a model's name in an address (letters, digits and ._- can): "
                f"give one, e.g. night={path}"
            )
        if any(name == other for other, _ in named):
            raise UserError(
                f"two models named '{name}': give one another name, e.g. {name}-2={path}"
            )
        named.append((name, path))
    return named


def find_key(file: Path | None, variable: str | None, host: str) -> str | None:
    """The API key from its file, or from the environment's variable.

    Raises UserError where it is too short, and where there is none although others than this
    machine can reach `host`.
    """
    key = read_text(file).strip() if file is not None else (variable or "").strip()
    where = str(file) if file is not None else KEY_VARIABLE
    if key:
        if len(key) < LEAST_KEY_LENGTH or not key.isascii() or not key.isprintable():
            raise UserError(
                f"{where}: an API key has {LEAST_KEY_LENGTH} or more printable ASCII characters, "
                "e.g. from openssl rand -hex 32"
            )
        return key
    if file is not None:
        raise UserError(f"{file} is empty: an API key is needed, e.g. from openssl rand -hex 32")
    if host not in LOOPBACK:
        raise UserError(
            f"--host {host} lets others in: an API key is needed, with --api-key-file FILE or in "
            f"{KEY_VARIABLE}; or leave --host away for this machine alone"
        )
    return None
