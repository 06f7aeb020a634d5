"""KServe v2 over HTTP: health, metadata, infer, statistics, and the repository's reload."""

import asyncio
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from srdeploy.imaging import Pixels
from srdeploy.serve.server.admission import BadRequest, Busy
from srdeploy.serve.server.desk import desk_of, visit_of
from srdeploy.serve.server.journal import log
from srdeploy.serve.server.kserve import (
    InferRequest,
    check_version,
    format_infer,
    model_metadata,
    parse_infer,
    read_header_length,
    repository_index,
    server_metadata,
)
from srdeploy.serve.server.kserve_tensors import HEADER_LENGTH
from srdeploy.serve.server.openapi import ERRORS, INFER
from srdeploy.serve.server.registry import ModelCard
from srdeploy.serve.server.routes_v1 import check_encoding

router = APIRouter(prefix="/v2", tags=["KServe v2"])
_SMALL_JSON = 2**16
"""Bytes of JSON that are read on the event loop; more would keep other requests waiting."""
_NAMED: dict[int | str, dict[str, Any]] = {404: ERRORS[404], 503: ERRORS[503]}


@dataclass(eq=False)
class TensorTask:
    """The images of one infer request; see `srdeploy.serve.scheduling.jobs.Task`."""

    request: InferRequest
    card: ModelCard

    def prepare(self) -> Pixels:
        """The request's own images: clients fit and normalise nothing."""
        return self.request.images

    def finish(self, labels: Pixels) -> tuple[bytes, dict[str, str]]:
        """The answer's body and headers."""
        return format_infer(self.request, self.card, labels)


@router.get("")
async def metadata() -> dict[str, Any]:
    """The server's name, version and extensions."""
    return server_metadata()


@router.get("/health/live")
async def live() -> dict[str, bool]:
    """The process answers."""
    return {"live": True}


@router.get("/health/ready", responses={503: ERRORS[503]})
async def ready(request: Request) -> dict[str, bool]:
    """Every model is loaded and warmed up."""
    if not desk_of(request).hub.ready:
        raise Busy("not ready: models are being loaded, or the server is stopping", 1)
    return {"ready": True}


@router.get("/models/{name}", responses=_NAMED)
@router.get("/models/{name}/versions/{version}", responses=_NAMED)
async def model(request: Request, name: str, version: str | None = None) -> dict[str, Any]:
    """A model's inputs, outputs and spec."""
    return model_metadata(_card(request, name, version))


@router.get("/models/{name}/ready", responses=_NAMED)
@router.get("/models/{name}/versions/{version}/ready", responses=_NAMED)
async def model_ready(request: Request, name: str, version: str | None = None) -> dict[str, Any]:
    """The model is loaded and warmed up."""
    return {"name": _card(request, name, version).name, "ready": True}


@router.post("/models/{name}/infer", response_class=Response, **INFER)
@router.post("/models/{name}/versions/{version}/infer", response_class=Response, **INFER)
async def infer(request: Request, name: str, version: str | None = None) -> Response:
    """Labels of images, as tensors: JSON, or JSON followed by binary data."""
    desk = desk_of(request)
    card = _card(request, name, version)
    visit_of(request).model = card.name
    check_encoding(request)
    header_length = read_header_length(request.headers.get(HEADER_LENGTH))
    body = await request.body()
    arguments = (body, header_length, card, desk.limits)
    if (len(body) if header_length is None else header_length) <= _SMALL_JSON:
        parsed = parse_infer(*arguments)
    else:
        parsed = await asyncio.to_thread(parse_infer, *arguments)
    task = TensorTask(parsed, card)
    ((content, headers),) = await desk.run(request, card.name, [task], parsed.timeout_s)
    return Response(content, headers=headers)


@router.get("/models/{name}/stats", responses=_NAMED)
@router.get("/models/{name}/versions/{version}/stats", responses=_NAMED)
async def statistics(request: Request, name: str, version: str | None = None) -> dict[str, Any]:
    """Counts and total times of a model's requests, in Triton's form."""
    card = _card(request, name, version)
    return {"model_stats": [desk_of(request).watch.tally(card.name).in_tritons_form(card)]}


@router.post("/repository/index")
async def index(request: Request) -> list[dict[str, str]]:
    """The models and their states."""
    return repository_index(desk_of(request).hub.cards)


@router.post(
    "/repository/models/{name}/load",
    responses={status: ERRORS[status] for status in (400, 404, 413, 503)},
)
async def load(request: Request, name: str) -> JSONResponse:
    """Reload a model from where the server was told at its start; requests go on meanwhile."""
    desk = desk_of(request)
    if not desk.reloads_here:
        raise BadRequest("this server has several workers: send its parent SIGHUP to reload them")
    body = await request.body()
    if body.strip() not in (b"", b"{}"):
        raise BadRequest("load takes no parameters: models come from where the server was told")
    card = await desk.hub.reload(name)
    log("reloaded", model=card.name, version=card.version)
    return JSONResponse({})


def _card(request: Request, name: str, version: str | None) -> ModelCard:
    card = desk_of(request).hub.card(name)
    if version is not None:
        check_version(card, version)
    return card
