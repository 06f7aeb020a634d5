"""Plain images over HTTP: photos in, masks, overlays or JSON out; and what the page shows."""

from collections.abc import Sequence
from email.message import Message as MediaType
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from srdeploy.serve.server.admission import BadRequest, NotFound, TooLarge, UnsupportedMedia
from srdeploy.serve.server.config import ServerLimits
from srdeploy.serve.server.openapi import ERRORS, SEGMENT
from srdeploy.serve.server.registry import ModelMetadata
from srdeploy.serve.server.segment_task import (
    ZIP,
    Output,
    PhotoAnswer,
    Regions,
    SegmentOptions,
    SegmentTask,
    pack,
)
from srdeploy.serve.server.state import AppState, app_state, request_context

router = APIRouter()
_ANY_BYTES = ("", "application/octet-stream", "application/x-www-form-urlencoded")
"""Content types of bodies that clients know nothing about; the last is what curl's --data-binary
sends. The image's format is read from its bytes."""
UploadedFile = tuple[str | None, bytes]
"""File name and content of one photo."""


@router.post("/v1/segment", tags=["images"], response_class=Response, **SEGMENT)
async def segment(
    request: Request,
    model: Annotated[
        str | None, Query(description="Name of the model; the first one by default.")
    ] = None,
    output: Annotated[
        Output | None,
        Query(description="Form of the answer; by default the Accept header decides."),
    ] = None,
    regions: Annotated[
        Regions, Query(description="In JSON, the form of each class's pixels.")
    ] = "none",
    opacity: Annotated[
        float, Query(ge=0, le=1, description="Opacity of the class colours in an overlay.")
    ] = 0.5,
    timeout_ms: Annotated[
        float | None, Query(gt=0, le=86_400_000, description="How long to wait for the answer.")
    ] = None,
) -> Response:
    """Segment one photo or several.

    Send an image's bytes (JPEG, PNG, WebP, BMP, TIFF), or multipart/form-data with files. A mask is
    a palette PNG of the photo's own size whose pixel values are class ids.
    """
    state = app_state(request)
    metadata = state.models.metadata(model)
    request_context(request).model = metadata.name
    options = _read_options(request, output, regions, opacity)
    uploads = await _read_uploads(request, state.limits)
    many = len(uploads) > 1
    tasks = [
        SegmentTask(content, name, metadata.spec, state.limits, options, number if many else None)
        for number, (name, content) in enumerate(uploads, start=1)
    ]
    uploads.clear()
    answers = await state.run(
        request, metadata.name, tasks, None if timeout_ms is None else timeout_ms / 1000
    )
    if options.output == "json":
        return JSONResponse(_describe_answers(request, metadata, answers))
    content, media_type = pack(answers, options)
    return Response(content, media_type=media_type)


@router.get("/v1/models", tags=["images"])
async def models(request: Request) -> dict[str, Any]:
    """The models with their classes and colours, samples, and limits."""
    state = app_state(request)
    return {
        "models": [_describe_model(state, metadata) for metadata in state.models.loaded],
        "samples": [
            {"name": sample.name, "url": f"/v1/samples/{index}"}
            for index, sample in enumerate(state.samples)
        ],
        "limits": state.limits.model_dump(),
        "key_needed": state.key_needed,
    }


@router.get(
    "/v1/samples/{index}",
    tags=["images"],
    response_class=Response,
    responses={200: {"content": {"image/jpeg": {}}}, 404: ERRORS[404]},
)
def sample(request: Request, index: int) -> Response:
    """One photo to try."""
    samples = app_state(request).samples
    if not 0 <= index < len(samples):
        raise NotFound(f"no sample {index}: there are {len(samples)}, from 0")
    return Response(
        samples[index].jpeg,
        media_type="image/jpeg",
        headers={"Cache-Control": "private, max-age=3600"},
    )


def _read_options(
    request: Request, output: Output | None, regions: Regions, opacity: float
) -> SegmentOptions:
    """The query's options; without `output`, the first known type in the Accept header."""
    accepted = [
        part.partition(";")[0].strip().lower()
        for part in request.headers.get("accept", "*/*").split(",")
    ]
    zipped = ZIP in accepted
    kinds: dict[str, Output] = {
        "image/png": "mask",
        "image/*": "mask",
        "*/*": "mask",
        ZIP: "mask",
        "image/jpeg": "overlay",
        "application/json": "json",
    }
    if output is None:
        output = next((kinds[kind] for kind in accepted if kind in kinds), None)
    if output is None:
        raise BadRequest(
            f"Accept: {', '.join(accepted)[:80]}: image/png (mask), image/jpeg (overlay), "
            f"application/json and {ZIP} are known; or use ?output="
        )
    return SegmentOptions(output, regions, opacity, zipped)


async def _read_uploads(request: Request, limits: ServerLimits) -> list[UploadedFile]:
    """The photos in the body. Raises BadRequest, TooLarge and UnsupportedMedia."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _read_form(request, limits)
    if not kind.startswith("image/") and kind not in _ANY_BYTES:
        raise UnsupportedMedia(
            f"Content-Type {kind[:80]}: send an image's bytes (image/jpeg, "
            "application/octet-stream), or multipart/form-data with files"
        )
    content = await request.body()
    if not content:
        raise BadRequest("the body is empty: send an image's bytes, or multipart/form-data")
    return [(None, content)]


async def _read_form(request: Request, limits: ServerLimits) -> list[UploadedFile]:
    boundary = MediaType()
    boundary["content-type"] = request.headers["content-type"]
    if not boundary.get_param("boundary"):
        raise BadRequest("multipart/form-data needs a boundary in its Content-Type")
    parser = MultiPartParser(
        request.headers,
        request.stream(),
        max_files=limits.images,
        max_fields=limits.images,
        max_part_size=limits.body_bytes,
    )
    parser.spool_max_size = limits.body_bytes + 1  # nothing is written to disk
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if "Too many" in error.message:
            raise TooLarge(
                f"more than {limits.images} images in one request: send fewer at once"
            ) from error
        raise BadRequest(f"not a readable form ({error.message})") from error
    try:
        files = [part for _, part in form.multi_items() if isinstance(part, UploadFile)]
        if not files:
            raise BadRequest("the form has no file: add the image as a file part")
        return [(file.filename or None, await file.read()) for file in files]
    finally:
        await form.close()


def _describe_answers(
    request: Request, metadata: ModelMetadata, answers: Sequence[PhotoAnswer]
) -> dict[str, Any]:
    context = request_context(request)
    steps = context.milliseconds()
    return {
        "model": metadata.name,
        "version": metadata.version,
        "images": [answer.entry for answer in answers],
        "timing_ms": {
            **{step: round(ms, 3) for step, ms in steps.items()},
            "total": round(sum(steps.values()), 3),
            "batch": max(item.timing.batch for item in context.items),
        },
    }


def _describe_model(state: AppState, metadata: ModelMetadata) -> dict[str, Any]:
    spec = metadata.spec
    return {
        "name": metadata.name,
        "version": metadata.version,
        "classes": [
            {"id": index, "name": name, "colour": list(colour)}
            for index, (name, colour) in enumerate(zip(spec.classes, spec.palette, strict=True))
        ],
        "void_colour": list(spec.void_colour),
        "backend": metadata.backend,
        "device": metadata.device,
        "precision": metadata.precision,
        "input": spec.input.model_dump(
            mode="json", include={"smallest", "usual", "largest", "longest_side"}
        ),
        "plan": state.models.plans[metadata.name].model_dump(mode="json", by_alias=True),
    }
