"""Names of files that are not complete yet."""

import itertools
import re
import secrets

_PARTIAL = re.compile(r"\.srdeploy\.[0-9a-f]{12}\.[0-9a-f]+\.part|\.cluster\.[0-9a-f]{8}\.part")
"""The second kind are the marks of cluster jobs; see ray_engine."""


class PartialNames:
    """Short names, whatever the file is to be called, that no other process on any machine
    makes."""

    def __init__(self) -> None:
        self._token = secrets.token_hex(6)
        self._count = itertools.count()

    def next(self) -> str:
        """A new one. Threads may ask at once."""
        return f".srdeploy.{self._token}.{next(self._count):x}.part"


def is_partial(name: str) -> bool:
    """Whether a file of that name was left by a write that was killed, if none is under way."""
    return _PARTIAL.fullmatch(name) is not None
