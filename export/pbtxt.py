"""Protocol buffers' text format, as far as configuration files need it.

A message is a dict of field names to values: str, int, bool, `Enum`, another dict, or a list of
these for a repeated field. A map is a list of {"key": ..., "value": ...}.
"""

from collections.abc import Iterator, Mapping
from typing import Any


class Enum(str):
    """The name of an enumeration's value, which is written without quotes."""


def to_pbtxt(message: Mapping[str, Any]) -> str:
    """The message as text, ASCII alone: other characters are written as escaped UTF-8 bytes."""
    return "".join(f"{line}\n" for line in _lines(message))


def _lines(message: Mapping[str, Any]) -> Iterator[str]:
    for field, value in message.items():
        several = value if isinstance(value, list) else [value]
        if several and not isinstance(several[0], Mapping):
            scalars = ", ".join(map(_scalar, several))
            yield f"{field}: [{scalars}]" if isinstance(value, list) else f"{field}: {scalars}"
            continue
        for one in several:
            yield f"{field} {{"
            yield from (f"  {line}" for line in _lines(one))
            yield "}"


def _scalar(value: str | int | bool) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | Enum):
        return str(value)
    return _quoted(value)


def _quoted(text: str) -> str:
    # Octal escapes always have three digits here: a digit that follows can't be taken for one.
    parts = []
    for byte in text.encode():
        character = chr(byte)
        if character in '"\\':
            parts.append("\\" + character)
        elif " " <= character <= "~":
            parts.append(character)
        else:
            parts.append(f"\\{byte:03o}")
    return '"' + "".join(parts) + '"'
