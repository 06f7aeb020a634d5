"""KServe v2 over HTTP: health, metadata, inference, statistics, and reloading models."""

import asyncio
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from srdeploy.imaging import Pixels
from srdeploy.serve.server.admission import BadRequest, Unavailable
from srdeploy.serve.server.kserve import (
    HEADER_LENGTH,
    InferRequest,
    check_version,
    format_infer,
    model_metadata,
    parse_infer,
    read_header_length,
    repository_index,
    server_metadata,
)
from srdeploy.serve.server.openapi import ERRORS, INFER
from srdeploy.serve.server.registry import ModelMetadata
from srdeploy.serve.server.server_log import log
from srdeploy.serve.server.state import app_state, request_context

router = APIRouter(prefix="/v2", tags=["KServe v2"])
_SMALL_JSON = 2**16
"""Most bytes of JSON parsed on the event loop: more would keep other requests waiting."""
_MODEL_ERRORS: dict[int | str, dict[str, Any]] = {404: ERRORS[404], 503: ERRORS[503]}


@dataclass(eq=False)
class InferTask:
    """The images of one infer request; see `srdeploy.serve.scheduling.scheduler.Task`."""

    request: InferRequest
    model: ModelMetadata

    def prepare(self) -> Pixels:
        """The request's images, unchanged: the graph itself normalises."""
        return self.request.images

    def finish(self, labels: Pixels) -> tuple[bytes, dict[str, str]]:
        """The answer's body and headers."""
        return format_infer(self.request, self.model, labels)


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
    if not app_state(request).models.ready:
        raise Unavailable("not ready: models are being loaded, or the server is stopping", 1)
    return {"ready": True}


@router.get("/models/{name}", responses=_MODEL_ERRORS)
@router.get("/models/{name}/versions/{version}", responses=_MODEL_ERRORS)
async def model(request: Request, name: str, version: str | None = None) -> dict[str, Any]:
    """A model's inputs, outputs and spec."""
    return model_metadata(_find_model(request, name, version))


@router.get("/models/{name}/ready", responses=_MODEL_ERRORS)
@router.get("/models/{name}/versions/{version}/ready", responses=_MODEL_ERRORS)
async def model_ready(request: Request, name: str, version: str | None = None) -> dict[str, Any]:
    """The model is loaded and warmed up."""
    return {"name": _find_model(request, name, version).name, "ready": True}


@router.post("/models/{name}/infer", response_class=Response, **INFER)
@router.post("/models/{name}/versions/{version}/infer", response_class=Response, **INFER)
async def infer(request: Request, name: str, version: str | None = None) -> Response:
    """Labels of images, as tensors: JSON, or JSON followed by binary data."""
    state = app_state(request)
    metadata = _find_model(request, name, version)
    request_context(request).model = metadata.name
    header_length = read_header_length(request.headers.get(HEADER_LENGTH))
    body = await request.body()
    arguments = (body, header_length, metadata, state.limits)
    if (len(body) if header_length is None else header_length) <= _SMALL_JSON:
        parsed = parse_infer(*arguments)
    else:
        parsed = await asyncio.to_thread(parse_infer, *arguments)
    task = InferTask(parsed, metadata)
    ((content, headers),) = await state.run(request, metadata.name, [task], parsed.timeout_s)
    return Response(content, headers=headers)


@router.get("/models/{name}/stats", responses=_MODEL_ERRORS)
@router.get("/models/{name}/versions/{version}/stats", responses=_MODEL_ERRORS)
async def statistics(request: Request, name: str, version: str | None = None) -> dict[str, Any]:
    """Counts and total times of a model's requests, in Triton's form."""
    metadata = _find_model(request, name, version)
    return {"model_stats": [app_state(request).metrics.stats(metadata.name).as_triton(metadata)]}


@router.post("/repository/index")
async def index(request: Request) -> list[dict[str, str]]:
    """The models and their states."""
    return repository_index(app_state(request).models.loaded)


@router.post(
    "/repository/models/{name}/load",
    responses={status: ERRORS[status] for status in (400, 404, 413, 503)},
)
async def load(request: Request, name: str) -> JSONResponse:
    """Reload a model from the path given at the start, while requests go on."""
    state = app_state(request)
    if not state.reloads_here:
        raise BadRequest("this server has several workers: send its parent SIGHUP to reload them")
    body = await request.body()
    if body.strip() not in (b"", b"{}"):
        raise BadRequest("load takes no parameters: models come from the paths given at the start")
    metadata = await state.models.reload(name)
    log("reloaded", model=metadata.name, version=metadata.version)
    return JSONResponse({})


def _find_model(request: Request, name: str, version: str | None) -> ModelMetadata:
    metadata = app_state(request).models.metadata(name)
    if version is not None:
        check_version(metadata, version)
    return metadata
