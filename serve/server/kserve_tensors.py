"""JSON that strangers sent: decoded strictly, then read field by field, with refusals that name the
field."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import NoReturn, TypeVar

import numpy as np

from srdeploy.imaging import Pixels
from srdeploy.serve.server.admission import BadRequest, TooLarge
from srdeploy.serve.server.config import ServerLimits
from srdeploy.serve.server.registry import ModelMetadata

MAX_JSON_MIB = 16
"""Of a request's JSON: a tensor of about 1280 x 720 as json.dumps writes it. Decoded, JSON takes up
to 28 times its size, and Python does nothing else meanwhile; binary tensors have neither cost."""

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
    """One object of a request."""

    where: str
    """Its place, e.g. inputs[0]; "" for the outermost."""
    values: dict[str, object]

    def path(self, key: str) -> str:
        """The place of one of its fields, e.g. inputs[0].name."""
        return f"{self.where}.{key}" if self.where else key

    def optional(self, key: str, kind: type[Value]) -> Value | None:
        """The field's value; None where it is absent or null. Raises BadRequest where it is of
        another kind: true is no number, 1.0 no whole one."""
        value = self.values.get(key)
        if value is None:
            return None
        if type(value) is not kind:
            raise BadRequest(f"{self.path(key)}: {shown(value)} was sent, {_KINDS[kind]} is needed")
        return value

    def required(self, key: str, kind: type[Value]) -> Value:
        """The field's value. Raises BadRequest where it is absent, null or of another kind."""
        value = self.optional(key, kind)
        if value is None:
            raise BadRequest(f"{self.path(key)} is missing: {_KINDS[kind]} is needed")
        return value

    def child(self, key: str) -> "JsonObject":
        """The object in the field; an empty one where it is absent or null. Raises BadRequest."""
        return JsonObject(self.path(key), self.optional(key, dict) or {})

    def children(self, key: str) -> Iterator["JsonObject"]:
        """The objects in the array in the field, one by one; none where it is absent or null.
        Raises BadRequest."""
        for index, value in enumerate(self.optional(key, list) or []):
            where = f"{self.path(key)}[{index}]"
            if type(value) is not dict:
                raise BadRequest(f"{where}: {shown(value)} was sent, an object is needed")
            yield JsonObject(where, value)


def decode_object(text: memoryview) -> JsonObject:
    """The request's outermost object.

    Raises TooLarge above MAX_JSON_MIB, and BadRequest for what is not UTF-8, not JSON (NaN and
    Infinity are not), nested too deeply, no object, or has a field twice.
    """
    if len(text) > MAX_JSON_MIB * 2**20:
        raise TooLarge(
            f"the request's JSON has {len(text) / 2**20:.1f} MiB, at most {MAX_JSON_MIB} are "
            "taken: send the tensor as binary data, which is many times faster as well "
            "(parameters.binary_data_size, and the header Inference-Header-Content-Length)"
        )
    try:
        # Decoded here, since json.loads takes bytes for UTF-16 or UTF-32 where they look like it.
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
    except ValueError as error:  # what Python says of whole numbers with thousands of digits
        raise BadRequest("the request's JSON has a number of too many digits") from error
    if type(decoded) is not dict:
        raise BadRequest(f"the request's JSON is {shown(decoded)}: an object is needed")
    return JsonObject("", decoded)


def shown(value: object) -> str:
    """A decoded value, short and in ASCII, for a refusal's line."""
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


# The tensors of the Open Inference Protocol: images in, labels out, as JSON or as binary data.

INPUT = "images"
OUTPUT = "labels"
DATATYPE = "UINT8"
HEADER_LENGTH = "Inference-Header-Content-Length"
"""HTTP header with the length of the JSON, in bytes, where binary data follow it."""

ImagesShape = tuple[int, int, int, int]


def read_images(
    tensor: JsonObject, payload: memoryview | None, model: ModelMetadata, limits: ServerLimits
) -> Pixels:
    """uint8 [N, H, W, 3] of a request's input; read-only, and where they are binary the memory of
    `payload` itself.

    payload: the bytes after the JSON; None: the request did not say where its JSON ends. Raises
    BadRequest, and TooLarge above the limits of images and pixels.
    """
    name, datatype = tensor.required("name", str), tensor.required("datatype", str)
    if name != INPUT:
        raise BadRequest(f'{tensor.path("name")}: {shown(name)} was sent, "{INPUT}" is needed')
    if datatype != DATATYPE:
        raise BadRequest(
            f'{tensor.path("datatype")}: {shown(datatype)} was sent, "{DATATYPE}" is needed: RGB '
            "pixels as they are, since the model normalises them itself"
        )
    shape = _read_shape(tensor, model, limits)
    parameters = tensor.child("parameters")
    refuse_shared_memory(parameters)
    size = parameters.optional("binary_data_size", int)
    data = tensor.optional("data", list)
    if size is not None:
        if data is not None:
            raise BadRequest(f"{tensor.where} has both data and binary_data_size: one is needed")
        return _from_binary(payload, size, shape, parameters.path("binary_data_size"))
    if payload:
        raise BadRequest(
            f"{len(payload)} bytes follow the JSON, but {tensor.where} has no "
            "parameters.binary_data_size"
        )
    if data is None:
        raise BadRequest(f"{tensor.where} has neither data nor parameters.binary_data_size")
    return _from_json(data, shape, tensor.path("data"))


def refuse_shared_memory(parameters: JsonObject) -> None:
    """Raises BadRequest where they point to memory that this server does not share."""
    for key in parameters.values:
        if key.startswith("shared_memory"):
            raise BadRequest(
                f"{parameters.where}: shared memory is not offered here: send binary data"
            )


def labels_as_json(labels: Pixels) -> bytes:
    """uint8 labels of any shape as the text of one flat JSON array.

    Numbers are padded with blanks to one width, so that numpy writes them all at once: about 30
    times faster than the json module, and other threads run meanwhile.
    """
    width = len(str(labels.max(initial=0)))
    numbers = "".join(f"{value:{width}}," for value in range(min(10**width, 256)))
    table = np.frombuffer(numbers.encode(), np.uint8).reshape(-1, width + 1)
    text = table.take(labels.ravel(), axis=0).tobytes()
    return b"[" + text[:-1] + b"]"


def _read_shape(tensor: JsonObject, model: ModelMetadata, limits: ServerLimits) -> ImagesShape:
    """N, H, W, 3: as the model takes them and within the limits."""
    where = tensor.path("shape")
    sizes = tensor.required("shape", list)
    if len(sizes) != 4:
        raise BadRequest(f"{where} has {len(sizes)} axes, 4 are needed: [N, H, W, 3]")
    for axis, (name, size) in enumerate(zip("NHWC", sizes, strict=True)):
        if type(size) is not int or size < 1:
            raise BadRequest(
                f"{where}[{axis}]: {name} is {shown(size)}, a whole number from 1 on is needed"
            )
        fixed = model.input_shape[axis]
        if fixed is not None and size != fixed:
            channels = ": RGB pixels, channels last" if name == "C" else f" by model {model.name}"
            raise BadRequest(
                f"{where}[{axis}]: {name} is {shown(size)}, {fixed} is needed{channels}"
            )
    images, height, width, channels = sizes
    if images > limits.images:
        raise TooLarge(
            f"{where}[0]: {shown(images)} images in one request, at most {limits.images} are taken"
        )
    most = limits.network_pixels(model.spec)
    if height * width > most:
        raise TooLarge(
            f"{where}: {shown(height)} x {shown(width)} (height x width) are more than "
            f"{most / 1e6:.3g} million pixels, the most that model {model.name} takes here"
        )
    least = model.spec.input.smallest
    if height < least[0] or width < least[1]:
        raise BadRequest(
            f"{where}: {height} x {width} (height x width) are too small, model {model.name} needs "
            f"at least {least[0]} x {least[1]}"
        )
    return images, height, width, channels


def _from_binary(payload: memoryview | None, size: int, shape: ImagesShape, where: str) -> Pixels:
    if payload is None:
        raise BadRequest(
            f"{where} is given, but the header {HEADER_LENGTH}, which says where the JSON ends, is "
            "not"
        )
    if size != prod(shape):
        raise BadRequest(
            f"{where} is {shown(size)}, but a {DATATYPE} tensor of shape {list(shape)} has "
            f"{prod(shape)} bytes"
        )
    if size != len(payload):
        raise BadRequest(f"{where} is {size}, but {len(payload)} bytes follow the JSON")
    return np.frombuffer(payload, np.uint8).reshape(shape)


def _from_json(data: list[object], shape: ImagesShape, where: str) -> Pixels:
    """The values of a flat array, or of one nested as the shape says.

    By way of bytes, since numpy would take true and "7" for numbers, and needs 8 bytes for each.
    """
    values = _flattened(data, shape, where) if data and type(data[0]) is list else data
    if len(values) != prod(shape):
        raise BadRequest(
            f"{where} has {len(values)} values, but shape {list(shape)} needs {prod(shape)}"
        )
    if set(map(type, values)) == {int}:
        try:
            return np.frombuffer(bytes(values), np.uint8).reshape(shape)  # type: ignore[arg-type]  # all are int
        except ValueError:
            pass  # one of them is no byte: found below
    wrong = next(value for value in values if type(value) is not int or not 0 <= value <= 255)
    raise BadRequest(
        f"{where} holds {shown(wrong)}: whole numbers 0..255 are needed, in one flat array or "
        "nested as the shape says"
    )


def _flattened(data: list[object], shape: ImagesShape, where: str) -> list[object]:
    level: list[list[object]] = [data]
    values: list[object] = []
    for axis, (name, size) in enumerate(zip("NHWC", shape, strict=True)):
        if axis:
            if set(map(type, values)) != {list}:
                raise BadRequest(
                    f"{where} is not nested down to {name} everywhere: nest it as shape "
                    f"{list(shape)} says, or leave it flat"
                )
            level = values  # type: ignore[assignment]  # all are lists
        for length in set(map(len, level)) - {size}:
            raise BadRequest(
                f"{where} has an array of {length} where shape {list(shape)} says {name} = {size}"
            )
        values = list(chain.from_iterable(level))
    return values
