"""JSON of untrusted clients: decoded strictly, then read field by field.

Every refusal names the field, e.g. inputs[0].shape.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from srdeploy.serve.server.admission import BadRequest, TooLarge

MAX_JSON_MIB = 16
"""Most MiB of a request's JSON: a tensor of about 1280 x 720 as json.dumps writes it. Decoding it
takes up to 28 times that memory and blocks Python; binary tensors have neither cost."""

Value = TypeVar("Value")

_KINDS: dict[type, str] = {
    str: "a string",
    int: "a whole number",
    bool: "true or false",
    dict: "an object",
    list: "an array",
}


@dataclass(frozen=True)
class JsonObject:
    """One JSON object of a request."""

    where: str
    """Its path, e.g. inputs[0]; "" for the outermost object."""
    values: dict[str, object]

    def path(self, key: str) -> str:
        """The path of one of its fields, e.g. inputs[0].name."""
        return f"{self.where}.{key}" if self.where else key

    def optional(self, key: str, kind: type[Value]) -> Value | None:
        """The field's value; None if it is absent or null. Raises BadRequest if it has another
        type: true is not a number, 1.0 not a whole one."""
        value = self.values.get(key)
        if value is None:
            return None
        if type(value) is not kind:
            raise BadRequest(f"{self.path(key)}: {shown(value)} was sent, {_KINDS[kind]} is needed")
        return value

    def required(self, key: str, kind: type[Value]) -> Value:
        """The field's value. Raises BadRequest if it is absent, null or of another type."""
        value = self.optional(key, kind)
        if value is None:
            raise BadRequest(f"{self.path(key)} is missing: {_KINDS[kind]} is needed")
        return value

    def child(self, key: str) -> "JsonObject":
        """The object in the field; an empty one if it is absent or null. Raises BadRequest."""
        return JsonObject(self.path(key), self.optional(key, dict) or {})

    def children(self, key: str) -> Iterator["JsonObject"]:
        """The objects in the field's array, one by one; none if it is absent or null. Raises
        BadRequest."""
        for index, value in enumerate(self.optional(key, list) or []):
            where = f"{self.path(key)}[{index}]"
            if type(value) is not dict:
                raise BadRequest(f"{where}: {shown(value)} was sent, an object is needed")
            yield JsonObject(where, value)


def decode_object(text: memoryview) -> JsonObject:
    """The request's outermost object.

    Raises TooLarge above MAX_JSON_MIB, and BadRequest for text that is not UTF-8, not JSON (NaN and
    Infinity are not), nested too deeply, not an object, or has a duplicate field.
    """
    if len(text) > MAX_JSON_MIB * 2**20:
        raise TooLarge(
            f"the request's JSON has {len(text) / 2**20:.1f} MiB, at most {MAX_JSON_MIB} are "
            "taken: send the tensor as binary data, which is many times faster as well "
            "(parameters.binary_data_size, and the header Inference-Header-Content-Length)"
        )
    try:
        # Decoded here: json.loads would guess UTF-16 or UTF-32 from the bytes.
        decoded = json.loads(
            str(text, "utf-8"), object_pairs_hook=_each_once, parse_constant=_refuse_constant
        )
    except UnicodeDecodeError as error:
        raise BadRequest(
            f"the request's JSON is not UTF-8 (byte {error.start}): where binary data follow it, "
            "the header Inference-Header-Content-Length must say how long the JSON is"
        ) from error
    except json.JSONDecodeError as error:
        raise BadRequest(
            f"the request's JSON is broken at character {error.pos}: {error.msg}"
        ) from error
    except RecursionError as error:
        raise BadRequest("the request's JSON is nested too deeply") from error
    except ValueError as error:  # whole numbers with thousands of digits
        raise BadRequest("the request's JSON has a number of too many digits") from error
    if type(decoded) is not dict:
        raise BadRequest(f"the request's JSON is {shown(decoded)}: an object is needed")
    return JsonObject("", decoded)


def shown(value: object) -> str:
    """A decoded value, short and in ASCII, for a refusal's message."""
    if type(value) is list:
        return f"an array of {len(value)}"
    if type(value) is dict:
        return "an object"
    text = json.dumps(value[:60] if type(value) is str else value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise BadRequest(f"the request's JSON has {shown(key)} twice in one object")
            seen.add(key)
    return values


def _refuse_constant(text: str) -> NoReturn:
    raise BadRequest(f"the request's JSON has {text}, which is not JSON")
