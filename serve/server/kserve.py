"""The Open Inference Protocol (KServe v2) with binary tensors: its messages, without HTTP.

Protocol: github.com/kserve/open-inference-protocol. Binary tensors, the model repository and the
timeout follow Triton's extensions of the same names. Unknown parameters are ignored, as Triton
does.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any

import numpy as np

from srdeploy import __version__
from srdeploy.imaging import Pixels
from srdeploy.runtimes.registry import find_backend
from srdeploy.serve.server.admission import BadRequest, NotFound, TooLarge
from srdeploy.serve.server.config import ServerLimits
from srdeploy.serve.server.registry import ModelMetadata
from srdeploy.serve.server.strict_json import JsonObject, decode_object, shown
from srdeploy.spec import ONNX_KEY

INPUT = "images"
OUTPUT = "labels"
DATATYPE = "UINT8"
HEADER_LENGTH = "Inference-Header-Content-Length"
"""HTTP header with the length of the JSON in bytes, if binary data follow it."""
EXTENSIONS = ("binary_tensor_data", "model_repository", "statistics")
"""The Triton extensions that this server has."""

_INT64_MAX = 2**63 - 1

_ImagesShape = tuple[int, int, int, int]


@dataclass(frozen=True)
class InferRequest:
    """One request to run a model."""

    images: Pixels
    """uint8 [N, H, W, 3], read-only: the body's own memory if it is binary."""
    binary: bool
    """Whether the labels are binary data after the answer's JSON, rather than numbers in it."""
    id: str | None
    """Any text. It goes only into the answer's JSON: a header could not hold it."""
    timeout_s: float | None
    """How long the client waits, in seconds; None: not given."""


def server_metadata() -> dict[str, Any]:
    """The answer to GET /v2."""
    return {"name": "srdeploy", "version": __version__, "extensions": list(EXTENSIONS)}


def model_metadata(model: ModelMetadata) -> dict[str, Any]:
    """The answer to GET /v2/models/NAME; -1 stands for axes of any size."""
    shape = [-1 if size is None else size for size in model.input_shape]
    backend = find_backend(model.backend)
    return {
        "name": model.name,
        "versions": [model.version],
        "platform": model.backend if backend is None else backend.platform,
        "inputs": [{"name": INPUT, "datatype": DATATYPE, "shape": shape}],
        "outputs": [{"name": OUTPUT, "datatype": DATATYPE, "shape": shape[:3]}],
        "parameters": {
            ONNX_KEY: model.spec.to_json(),
            "precision": model.precision,
            "device": model.device,
            "backend": model.backend,
        },
    }


def repository_index(models: Iterable[ModelMetadata]) -> list[dict[str, str]]:
    """The answer to POST /v2/repository/index, for models that are loaded."""
    return [
        {"name": model.name, "version": model.version, "state": "READY", "reason": ""}
        for model in models
    ]


def check_version(model: ModelMetadata, version: str) -> None:
    """Raises NotFound if `version` is not the loaded one."""
    if version != model.version:
        raise NotFound(
            f"model {model.name} has no version {shown(version)}: {model.version} is loaded"
        )


def read_header_length(text: str | None) -> int | None:
    """The value of the header Inference-Header-Content-Length in bytes; None if it is absent.
    Raises BadRequest."""
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise BadRequest(f"{HEADER_LENGTH}: {shown(text)} was sent, a number of bytes is needed")
    return int(text)


def parse_infer(
    body: bytes | bytearray | memoryview,
    header_length: int | None,
    model: ModelMetadata,
    limits: ServerLimits,
) -> InferRequest:
    """Reads the body of POST /v2/models/NAME/infer.

    header_length: bytes of JSON before the binary data; None: all is JSON. Raises BadRequest if
    the request breaks the protocol or does not fit the model, NotFound if it asks for another
    version, and TooLarge above the limits. A shape by itself never allocates memory.
    """
    whole = memoryview(body).cast("B")
    if header_length is None:
        text, payload = whole, None
    else:
        if not 0 < header_length <= len(whole):
            raise BadRequest(
                f"{HEADER_LENGTH} is {shown(header_length)}, but the body has {len(whole)} bytes, "
                "which begin with the JSON: raw tensors without JSON are not taken"
            )
        text, payload = whole[:header_length], whole[header_length:]
    request = decode_object(text)
    version = request.optional("model_version", str)
    if version:
        check_version(model, version)
    parameters = request.child("parameters")
    _refuse_sequences(parameters)
    binary = _read_outputs(request, parameters)
    inputs = request.required("inputs", list)
    if len(inputs) != 1:
        raise BadRequest(f'inputs has {len(inputs)} tensors, one is needed: "{INPUT}"')
    (tensor,) = request.children("inputs")
    return InferRequest(
        images=_read_images(tensor, payload, model, limits),
        binary=binary,
        id=request.optional("id", str),
        timeout_s=_read_timeout(parameters),
    )


def format_infer(
    request: InferRequest, model: ModelMetadata, labels: Pixels
) -> tuple[bytes, dict[str, str]]:
    """The answer's body and headers for labels uint8 [N, H, W], in the requested form."""
    output: dict[str, Any] = {"name": OUTPUT, "datatype": DATATYPE, "shape": list(labels.shape)}
    if request.binary:
        output["parameters"] = {"binary_data_size": labels.size}
    answer: dict[str, Any] = {"model_name": model.name, "model_version": model.version}
    if request.id is not None:
        answer["id"] = request.id
    answer["outputs"] = [output]
    text = json.dumps(answer, separators=(",", ":")).encode()
    if request.binary:
        headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(text))}
        return b"".join((text, np.ascontiguousarray(labels).data)), headers
    end = b"}]}"  # of the output, the outputs and the answer: the values go before it
    body = b"".join((text.removesuffix(end), b',"data":', _labels_as_json(labels), end))
    return body, {"Content-Type": "application/json"}


def _read_outputs(request: JsonObject, parameters: JsonObject) -> bool:
    """Whether the labels, the only output, are requested as binary data."""
    binary = parameters.optional("binary_data_output", bool) or False
    for index, output in enumerate(request.children("outputs")):
        name = output.required("name", str)
        if name != OUTPUT:
            raise BadRequest(
                f'{output.path("name")}: {shown(name)} was requested, the only output is "{OUTPUT}"'
            )
        if index:
            raise BadRequest(f'{output.path("name")}: "{OUTPUT}" is requested twice')
        parameters = output.child("parameters")
        _refuse_shared_memory(parameters)
        if parameters.optional("classification", int):
            raise BadRequest(
                f"{parameters.path('classification')}: the model gives classes without scores: "
                "leave it out"
            )
        own = parameters.optional("binary_data", bool)
        binary = binary if own is None else own
    return binary


def _refuse_sequences(parameters: JsonObject) -> None:
    for key in ("sequence_id", "sequence_start", "sequence_end"):
        if parameters.values.get(key):
            raise BadRequest(
                f"{parameters.path(key)}: the model keeps nothing from one request to the next: "
                "leave it out"
            )


def _read_timeout(parameters: JsonObject) -> float | None:
    """The timeout in seconds, from microseconds; 0 means none, as in Triton."""
    timeout = parameters.optional("timeout", int)
    if timeout is not None and not 0 <= timeout <= _INT64_MAX:
        raise BadRequest(
            f"{parameters.path('timeout')}: {shown(timeout)} was sent, microseconds are needed"
        )
    return timeout / 1e6 if timeout else None


def _read_images(
    tensor: JsonObject, payload: memoryview | None, model: ModelMetadata, limits: ServerLimits
) -> Pixels:
    """The images of a request's input, uint8 [N, H, W, 3], read-only; binary ones share the memory
    of `payload`.

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
    _refuse_shared_memory(parameters)
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


def _read_shape(tensor: JsonObject, model: ModelMetadata, limits: ServerLimits) -> _ImagesShape:
    """(N, H, W, 3), checked against the model and the limits."""
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


def _from_binary(payload: memoryview | None, size: int, shape: _ImagesShape, where: str) -> Pixels:
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


def _from_json(data: list[object], shape: _ImagesShape, where: str) -> Pixels:
    """The values of a flat array, or of one nested as the shape says.

    They are converted through bytes: numpy would accept true and "7" as numbers, and need 8 bytes
    for each.
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
            pass  # one of them is not a byte: found below
    wrong = next(value for value in values if type(value) is not int or not 0 <= value <= 255)
    raise BadRequest(
        f"{where} holds {shown(wrong)}: whole numbers 0..255 are needed, in one flat array or "
        "nested as the shape says"
    )


def _flattened(data: list[object], shape: _ImagesShape, where: str) -> list[object]:
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


def _refuse_shared_memory(parameters: JsonObject) -> None:
    """Raises BadRequest if they refer to shared memory, which this server does not offer."""
    for key in parameters.values:
        if key.startswith("shared_memory"):
            raise BadRequest(
                f"{parameters.where}: shared memory is not offered here: send binary data"
            )


def _labels_as_json(labels: Pixels) -> bytes:
    """uint8 labels of any shape as the text of one flat JSON array.

    Numbers are padded with spaces to equal width, so that numpy writes them all at once: about 30
    times faster than the json module, and without blocking other threads.
    """
    width = len(str(labels.max(initial=0)))
    numbers = "".join(f"{value:{width}}," for value in range(min(10**width, 256)))
    table = np.frombuffer(numbers.encode(), np.uint8).reshape(-1, width + 1)
    text = table.take(labels.ravel(), axis=0).tobytes()
    return b"[" + text[:-1] + b"]"
