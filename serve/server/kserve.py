"""The Open Inference Protocol (KServe v2) with binary tensors: what is said, without HTTP.

Protocol: github.com/kserve/open-inference-protocol; binary tensors, model repository and timeout as
in Triton's extensions of the same names. Parameters that mean nothing here are
passed over, as Triton does.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from srdeploy import __version__
from srdeploy.imaging import Pixels
from srdeploy.runtimes.registry import find_backend
from srdeploy.serve.server.admission import BadRequest, Limits, NotFound
from srdeploy.serve.server.kserve_tensors import (
    DATATYPE,
    HEADER_LENGTH,
    INPUT,
    OUTPUT,
    JsonObject,
    decode_object,
    labels_as_json,
    read_images,
    refuse_shared_memory,
    shown,
)
from srdeploy.serve.server.registry import ModelCard
from srdeploy.spec import ONNX_KEY

EXTENSIONS = ("binary_tensor_data", "model_repository", "statistics")
"""Of Triton's, those that this server has."""

_INT64_MAX = 2**63 - 1


@dataclass(frozen=True)
class RequestedOutput:
    """One tensor that the client wants back."""

    name: str
    binary: bool
    """Binary data behind the answer's JSON, rather than numbers in it."""


@dataclass(frozen=True)
class InferRequest:
    """One request to run a model."""

    images: Pixels
    """uint8 [N, H, W, 3], read-only: the body's own memory where it is binary."""
    outputs: tuple[RequestedOutput, ...]
    """All outputs where the client named none."""
    id: str | None
    """Any text, for the answer's JSON alone: a header could not hold it."""
    timeout_s: float | None
    """How long the client waits, in seconds; None: it did not say."""
    binary_data_output: bool
    """Whether outputs are binary unless they say otherwise."""


def server_metadata() -> dict[str, Any]:
    """The answer to GET /v2."""
    return {"name": "srdeploy", "version": __version__, "extensions": list(EXTENSIONS)}


def model_metadata(card: ModelCard) -> dict[str, Any]:
    """The answer to GET /v2/models/NAME; -1 stands for axes of any size."""
    shape = [-1 if size is None else size for size in card.input_shape]
    backend = find_backend(card.backend)
    return {
        "name": card.name,
        "versions": [card.version],
        "platform": card.backend if backend is None else backend.platform,
        "inputs": [{"name": INPUT, "datatype": DATATYPE, "shape": shape}],
        "outputs": [{"name": OUTPUT, "datatype": DATATYPE, "shape": shape[:3]}],
        "parameters": {
            ONNX_KEY: card.spec.to_json(),
            "precision": card.precision,
            "device": card.device,
            "backend": card.backend,
        },
    }


def repository_index(cards: Iterable[ModelCard]) -> list[dict[str, str]]:
    """The answer to POST /v2/repository/index, for models that are loaded."""
    return [
        {"name": card.name, "version": card.version, "state": "READY", "reason": ""}
        for card in cards
    ]


def check_version(card: ModelCard, version: str) -> None:
    """Raises NotFound where `version` is not the one that is loaded."""
    if version != card.version:
        raise NotFound(
            f"model {card.name} has no version {shown(version)}: {card.version} is loaded"
        )


def read_header_length(text: str | None) -> int | None:
    """The value of the header Inference-Header-Content-Length in bytes; None where it is absent.
    Raises BadRequest."""
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise BadRequest(f"{HEADER_LENGTH}: {shown(text)} was sent, a number of bytes is needed")
    return int(text)


def parse_infer(
    body: bytes | bytearray | memoryview,
    header_length: int | None,
    card: ModelCard,
    limits: Limits,
) -> InferRequest:
    """Reads the body of POST /v2/models/NAME/infer.

    header_length: bytes of JSON before the binary data; None: all is JSON. Raises BadRequest for
    what is not of the protocol or does not fit the model, NotFound where the JSON asks for another
    version, TooLarge above the limits. No memory is taken that only a shape asks for.
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
        check_version(card, version)
    parameters = request.child("parameters")
    _refuse_sequences(parameters)
    binary = parameters.optional("binary_data_output", bool) or False
    outputs = _read_outputs(request, binary)
    inputs = request.required("inputs", list)
    if len(inputs) != 1:
        raise BadRequest(f'inputs has {len(inputs)} tensors, one is needed: "{INPUT}"')
    (tensor,) = request.children("inputs")
    return InferRequest(
        images=read_images(tensor, payload, card, limits),
        outputs=outputs,
        id=request.optional("id", str),
        timeout_s=_read_timeout(parameters),
        binary_data_output=binary,
    )


def format_infer(
    request: InferRequest, card: ModelCard, labels: Pixels
) -> tuple[bytes, dict[str, str]]:
    """The answer's body and headers, for labels uint8 [N, H, W], in the form that was asked for."""
    (wanted,) = request.outputs
    output: dict[str, Any] = {
        "name": wanted.name,
        "datatype": DATATYPE,
        "shape": list(labels.shape),
    }
    if wanted.binary:
        output["parameters"] = {"binary_data_size": labels.size}
    answer: dict[str, Any] = {"model_name": card.name, "model_version": card.version}
    if request.id is not None:
        answer["id"] = request.id
    answer["outputs"] = [output]
    text = json.dumps(answer, separators=(",", ":")).encode()
    if wanted.binary:
        headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(text))}
        return b"".join((text, np.ascontiguousarray(labels).data)), headers
    end = b"}]}"  # of the output, the outputs and the answer: the values go before it
    body = b"".join((text.removesuffix(end), b',"data":', labels_as_json(labels), end))
    return body, {"Content-Type": "application/json"}


def _read_outputs(request: JsonObject, binary: bool) -> tuple[RequestedOutput, ...]:
    outputs: list[RequestedOutput] = []
    for wanted in request.children("outputs"):
        name = wanted.required("name", str)
        if name != OUTPUT:
            raise BadRequest(
                f'{wanted.path("name")}: {shown(name)} was asked for, "{OUTPUT}" is there'
            )
        if outputs:
            raise BadRequest(f'{wanted.path("name")}: "{OUTPUT}" is asked for twice')
        parameters = wanted.child("parameters")
        refuse_shared_memory(parameters)
        if parameters.optional("classification", int):
            raise BadRequest(
                f"{parameters.path('classification')}: a class for each pixel is all there is, "
                "without scores: leave it out"
            )
        own = parameters.optional("binary_data", bool)
        outputs.append(RequestedOutput(name, binary if own is None else own))
    return tuple(outputs) or (RequestedOutput(OUTPUT, binary),)


def _refuse_sequences(parameters: JsonObject) -> None:
    for key in ("sequence_id", "sequence_start", "sequence_end"):
        if parameters.values.get(key):
            raise BadRequest(
                f"{parameters.path(key)}: the model keeps nothing from one request to the next: "
                "leave it out"
            )


def _read_timeout(parameters: JsonObject) -> float | None:
    """In seconds, from microseconds; 0 means none, as in Triton."""
    timeout = parameters.optional("timeout", int)
    if timeout is not None and not 0 <= timeout <= _INT64_MAX:
        raise BadRequest(
            f"{parameters.path('timeout')}: {shown(timeout)} was sent, microseconds are needed"
        )
    return timeout / 1e6 if timeout else None
