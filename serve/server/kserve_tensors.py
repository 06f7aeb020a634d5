"""The tensors of the Open Inference Protocol: images in, labels out, as JSON or as binary data.

Whatever the graph, they are `images` UINT8 [N, H, W, 3] and `labels` UINT8 [N, H, W].
"""

from itertools import chain
from math import prod

import numpy as np

from srdeploy.imaging import Pixels
from srdeploy.serve.server.card import ModelCard
from srdeploy.serve.server.kserve_json import JsonObject, shown
from srdeploy.serve.server.limits import Limits
from srdeploy.serve.server.refusals import BadRequest, TooLarge

INPUT = "images"
OUTPUT = "labels"
DATATYPE = "UINT8"
HEADER_LENGTH = "Inference-Header-Content-Length"
"""HTTP header with the length of the JSON, in bytes, where binary data follow it."""

ImagesShape = tuple[int, int, int, int]


def read_images(
    tensor: JsonObject, payload: memoryview | None, card: ModelCard, limits: Limits
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
    shape = _read_shape(tensor, card, limits)
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


def _read_shape(tensor: JsonObject, card: ModelCard, limits: Limits) -> ImagesShape:
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
        fixed = card.input_shape[axis]
        if fixed is not None and size != fixed:
            channels = ": RGB pixels, channels last" if name == "C" else f" by model {card.name}"
            raise BadRequest(
                f"{where}[{axis}]: {name} is {shown(size)}, {fixed} is needed{channels}"
            )
    images, height, width, channels = sizes
    if images > limits.images:
        raise TooLarge(
            f"{where}[0]: {shown(images)} images in one request, at most {limits.images} are taken"
        )
    most = limits.network_pixels(card.spec)
    if height * width > most:
        raise TooLarge(
            f"{where}: {shown(height)} x {shown(width)} (height x width) are more than "
            f"{most / 1e6:.3g} million pixels, the most that model {card.name} takes here"
        )
    least = card.spec.input.smallest
    if height < least[0] or width < least[1]:
        raise BadRequest(
            f"{where}: {height} x {width} (height x width) are too small, model {card.name} needs "
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
