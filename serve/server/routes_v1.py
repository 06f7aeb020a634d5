"""Plain requests: photos in, masks, overlays or JSON out; and what the page needs to know."""

from collections.abc import Sequence
from email.message import Message as MediaType
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from srdeploy.serve.server.admission import BadRequest, Limits, NotFound, TooLarge, UnsupportedMedia
from srdeploy.serve.server.desk import Desk, desk_of, visit_of
from srdeploy.serve.server.openapi import ERRORS, SEGMENT
from srdeploy.serve.server.photo_task import (
    ZIP,
    Output,
    PhotoAnswer,
    PhotoTask,
    Regions,
    Wanted,
    pack,
)
from srdeploy.serve.server.registry import ModelCard

router = APIRouter()
_ANY_BYTES = ("", "application/octet-stream", "application/x-www-form-urlencoded")
"""What clients call a body that they were told nothing about; the last is curl's --data-binary. The
bytes themselves tell what they are."""
Upload = tuple[str | None, bytes]
"""File name and content."""


@router.post("/v1/segment", tags=["images"], response_class=Response, **SEGMENT)
async def segment(
    request: Request,
    model: Annotated[
        str | None, Query(description="Name of the model; the first one by default.")
    ] = None,
    output: Annotated[
        Output | None,
        Query(description="What to answer with; by the Accept header where it is left out."),
    ] = None,
    regions: Annotated[
        Regions, Query(description="In JSON, how each class's pixels are given.")
    ] = "none",
    opacity: Annotated[
        float, Query(ge=0, le=1, description="Of the class colours in an overlay.")
    ] = 0.5,
    timeout_ms: Annotated[
        float | None, Query(gt=0, le=86_400_000, description="How long the answer is waited for.")
    ] = None,
) -> Response:
    """Segment one photo or several.

    Send an image's bytes (JPEG, PNG, WebP, BMP, TIFF), or multipart/form-data with files. A mask is
    a palette PNG of the photo's own size whose pixel values are class ids.
    """
    desk = desk_of(request)
    card = desk.hub.card(model)
    visit_of(request).model = card.name
    wanted = _wanted(request, output, regions, opacity)
    uploads = await _read_uploads(request, desk.limits)
    many = len(uploads) > 1
    tasks = [
        PhotoTask(content, name, card.spec, desk.limits, wanted, number if many else None)
        for number, (name, content) in enumerate(uploads, start=1)
    ]
    uploads.clear()
    answers = await desk.run(
        request, card.name, tasks, None if timeout_ms is None else timeout_ms / 1000
    )
    if wanted.output == "json":
        return JSONResponse(_described(request, card, answers))
    content, media_type = pack(answers, wanted)
    return Response(content, media_type=media_type)


@router.get("/v1/models", tags=["images"])
async def models(request: Request) -> dict[str, Any]:
    """The models with their classes and colours, samples, and limits."""
    desk = desk_of(request)
    return {
        "models": [_model(desk, card) for card in desk.hub.cards],
        "samples": [
            {"name": sample.name, "url": f"/v1/samples/{index}"}
            for index, sample in enumerate(desk.samples)
        ],
        "limits": desk.limits.model_dump(),
        "key_needed": desk.key_needed,
    }


@router.get(
    "/v1/samples/{index}",
    tags=["images"],
    response_class=Response,
    responses={200: {"content": {"image/jpeg": {}}}, 404: ERRORS[404]},
)
def sample(request: Request, index: int) -> Response:
    """One photo to try."""
    samples = desk_of(request).samples
    if not 0 <= index < len(samples):
        raise NotFound(f"no sample {index}: there are {len(samples)}, from 0")
    return Response(
        samples[index].jpeg,
        media_type="image/jpeg",
        headers={"Cache-Control": "private, max-age=3600"},
    )


def _wanted(request: Request, output: Output | None, regions: Regions, opacity: float) -> Wanted:
    """What the query says, and else the first kind in the Accept header that there is."""
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
            f"application/json and {ZIP} can be given; or say ?output="
        )
    return Wanted(output, regions, opacity, zipped)


async def _read_uploads(request: Request, limits: Limits) -> list[Upload]:
    """Raises BadRequest, TooLarge and UnsupportedMedia."""
    check_encoding(request)
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


async def _read_form(request: Request, limits: Limits) -> list[Upload]:
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
    parser.spool_max_size = limits.body_bytes + 1  # nothing is written to the disk
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


def check_encoding(request: Request) -> None:
    """Raises UnsupportedMedia: what unpacks to an unknown size is not unpacked."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", ""):
        raise UnsupportedMedia(
            f"Content-Encoding {encoding[:40]}: send the body as it is; images are small already"
        )


def _described(request: Request, card: ModelCard, answers: Sequence[PhotoAnswer]) -> dict[str, Any]:
    visit = visit_of(request)
    steps = visit.milliseconds()
    return {
        "model": card.name,
        "version": card.version,
        "images": [answer.entry for answer in answers],
        "timing_ms": {
            **{step: round(ms, 3) for step, ms in steps.items()},
            "total": round(sum(steps.values()), 3),
            "batch": max(job.timing.batch for job in visit.jobs),
        },
    }


def _model(desk: Desk, card: ModelCard) -> dict[str, Any]:
    spec = card.spec
    return {
        "name": card.name,
        "version": card.version,
        "classes": [
            {"id": index, "name": name, "colour": list(colour)}
            for index, (name, colour) in enumerate(zip(spec.classes, spec.palette, strict=True))
        ],
        "void_colour": list(spec.void_colour),
        "backend": card.backend,
        "device": card.device,
        "precision": card.precision,
        "input": spec.input.model_dump(
            mode="json", include={"smallest", "usual", "largest", "longest_side"}
        ),
        "plan": desk.hub.plans[card.name].model_dump(mode="json"),
    }
