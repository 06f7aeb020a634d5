"""The application of one server process: routes, page, errors, start and stop."""

import asyncio
import multiprocessing
import multiprocessing.process
import os
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from srdeploy import __version__
from srdeploy.errors import UserError
from srdeploy.serve.scheduling.planner import Plan
from srdeploy.serve.server import routes_v1, routes_v2
from srdeploy.serve.server.admission import BadRequest, Gate, Refusal
from srdeploy.serve.server.config import ServerConfig
from srdeploy.serve.server.desk import Desk, desk_of
from srdeploy.serve.server.journal import LOG, log
from srdeploy.serve.server.metrics import Watch
from srdeploy.serve.server.middleware import CLIENT_GONE, Guard, answer_refusal
from srdeploy.serve.server.openapi import describe
from srdeploy.serve.server.page import load_samples, render_page
from srdeploy.serve.server.registry import ClientGone, Hub, ModelCard

_DESCRIPTION = """Segmentation over HTTP: plain images on `/v1/segment`, tensors by KServe's v2
protocol on `/v2`. Errors are `{"error": "one line"}`."""


def make_desk(config: ServerConfig) -> Desk:
    """The server's state; nothing is loaded yet. Raises UserError where samples can't be read."""
    return Desk(
        hub=Hub(config.sources, config.cores, config.wishes, config.plans),
        limits=config.limits,
        gate=Gate(config.limits),
        watch=Watch(),
        samples=load_samples(config.samples),
        key_needed=config.api_key is not None,
        reloads_here=config.workers == 1,
    )


def make_app(config: ServerConfig, desk: Desk) -> ASGIApp:
    """The application. Models are loaded while it runs, and `desk.hub.ready` says when they are."""
    app = FastAPIOffline(
        redoc_url=None,
        static_url="/static",
        title="srdeploy",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=_lifespan,
    )
    app.state.desk = desk
    app.openapi = partial(describe, app)  # type: ignore[method-assign]
    app.include_router(routes_v1.router)
    app.include_router(routes_v2.router)
    app.add_api_route("/", _page, include_in_schema=False)
    app.add_api_route("/metrics", _metrics, tags=["operations"], response_class=PlainTextResponse)
    app.add_exception_handler(Refusal, _on_refusal)
    app.add_exception_handler(UserError, _on_user_error)
    app.add_exception_handler(ClientGone, _on_client_gone)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_exception)
    return Guard(app, desk, config.api_key, config.loopback)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Loads the models beside the event loop, so that `live` is answered from the start."""
    desk: Desk = app.state.desk
    loop = asyncio.get_running_loop()
    loading = loop.run_in_executor(None, _load, desk)
    if not desk.reloads_here:
        await loading  # a worker takes requests once it can answer them
        if desk.fault is not None:
            raise desk.fault
        loop.add_signal_handler(
            signal.SIGTERM, _drain_worker, desk, signal.getsignal(signal.SIGTERM)
        )
        _TASKS.add(asyncio.ensure_future(_leave_with(multiprocessing.parent_process())))
    elif threading.current_thread() is threading.main_thread():
        loop.add_signal_handler(signal.SIGHUP, partial(_reload_all, desk))
    yield
    desk.hub.stopping = True
    await loading
    await asyncio.to_thread(desk.hub.close)
    desk.watch.leave()
    log("stopped")


def _drain_worker(desk: Desk, stop: Any) -> None:
    """On a worker's SIGTERM: it goes on for a while, telling clients to ask elsewhere, and then
    does what uvicorn does. (Without workers, `run.Server` does the same.)"""
    if not desk.hub.stopping:
        desk.hub.stopping = True
        loop = asyncio.get_running_loop()
        loop.call_later(desk.limits.drain_s, stop, signal.SIGTERM, None)


async def _leave_with(parent: multiprocessing.process.BaseProcess | None) -> None:
    """Ends a worker whose parent was killed: nobody would reload, restart or stop it."""
    assert parent is not None
    while os.getppid() == parent.pid:
        await asyncio.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def _load(desk: Desk) -> None:
    try:
        desk.hub.load(_tell)
    except BaseException as error:
        desk.fault = error
        desk.stop()
        return
    desk.refresh_gauges()
    log("ready", models=",".join(desk.hub.names))


def _tell(card: ModelCard, plan: Plan) -> None:
    runs = f"{card.backend}, {card.device}, {card.precision}"
    log("loaded", model=card.name, runs=runs, plan=str(plan))


def _reload_all(desk: Desk) -> None:
    """On SIGHUP."""
    for name in desk.hub.names:
        task = asyncio.ensure_future(_reload(desk, name))
        _TASKS.add(task)
        task.add_done_callback(_TASKS.discard)


async def _reload(desk: Desk, name: str) -> None:
    try:
        card = await desk.hub.reload(name)
    except UserError as error:
        LOG.error(f"not reloaded: {error}", extra={"fields": {"model": name}})
    else:
        log("reloaded", model=name, version=card.version)


_TASKS: set["asyncio.Task[None]"] = set()
"""The event loop itself holds tasks weakly."""


async def _page() -> HTMLResponse:
    page, policy = render_page()
    return HTMLResponse(
        page, headers={"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}
    )


async def _metrics(request: Request) -> PlainTextResponse:
    """Prometheus's metrics."""
    desk = desk_of(request)
    desk.refresh_gauges()
    return PlainTextResponse(desk.watch.text(), media_type=desk.watch.content_type)


def _on_refusal(_: Request, error: Any) -> Response:
    return answer_refusal(error)


def _on_user_error(_: Request, error: Any) -> Response:
    """Images that the runtime can't take, say."""
    return answer_refusal(BadRequest(str(error)))


def _on_client_gone(_: Request, __: Any) -> Response:
    return Response(status_code=CLIENT_GONE)


def _on_invalid(_: Request, error: Any) -> Response:
    fault = error.errors()[0]
    where = ".".join(str(part) for part in fault["loc"][1:]) or "the request"
    reason = str(fault["msg"]).removeprefix("Value error, ")
    return answer_refusal(BadRequest(f"{where}: {reason[:1].lower()}{reason[1:]}"))


def _on_http_exception(request: Request, error: Any) -> Response:
    message = str(error.detail)
    if error.status_code == 404:
        message = f"no such address: {request.url.path[:200]} (/docs lists them)"
    elif error.status_code == 405:
        message = f"{request.url.path[:200]} does not take {request.method}"
    return JSONResponse({"error": message}, error.status_code, error.headers)
