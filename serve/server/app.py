"""The application of one server process: its routes, error handlers, startup and shutdown."""

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
from srdeploy.serve.scheduling.planner import SessionPlan
from srdeploy.serve.server import routes_v1, routes_v2
from srdeploy.serve.server.admission import AdmissionControl, BadRequest, Refusal
from srdeploy.serve.server.config import ServerConfig
from srdeploy.serve.server.metrics import ServerMetrics
from srdeploy.serve.server.middleware import CLIENT_GONE, RequestMiddleware, refusal_response
from srdeploy.serve.server.openapi import describe
from srdeploy.serve.server.page import load_samples, render_page
from srdeploy.serve.server.registry import ClientGone, ModelMetadata, ModelRegistry
from srdeploy.serve.server.server_log import LOG, log
from srdeploy.serve.server.state import AppState, app_state

_DESCRIPTION = """Segmentation over HTTP: plain images on `/v1/segment`, tensors by KServe's v2
protocol on `/v2`. Errors are `{"error": "one line"}`."""
_TASKS: set["asyncio.Task[None]"] = set()
"""Running tasks: the event loop itself holds them only weakly."""


def make_state(config: ServerConfig) -> AppState:
    """The state of a server that has loaded no model. Raises UserError for unreadable samples."""
    return AppState(
        models=ModelRegistry(config.sources, config.cores, config.constraints, config.plans),
        limits=config.limits,
        admission=AdmissionControl(config.limits),
        metrics=ServerMetrics(),
        samples=load_samples(config.samples),
        key_needed=config.api_key is not None,
        reloads_here=config.workers == 1,
    )


def make_app(config: ServerConfig, state: AppState) -> ASGIApp:
    """The application. It loads its models while it runs; `state.models.ready` turns true then."""
    app = FastAPIOffline(
        redoc_url=None,
        static_url="/static",
        title="srdeploy",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=_lifespan,
    )
    app.state.server = state
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
    return RequestMiddleware(app, state, config.api_key, config.loopback)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Loads the models off the event loop, so that `live` is answered from the start."""
    state: AppState = app.state.server
    loop = asyncio.get_running_loop()
    loading = loop.run_in_executor(None, _load, state)
    if not state.reloads_here:
        await loading  # a worker process accepts requests once it can answer them
        if state.startup_error is not None:
            raise state.startup_error
        loop.add_signal_handler(
            signal.SIGTERM, _drain_worker, state, signal.getsignal(signal.SIGTERM)
        )
        _TASKS.add(asyncio.ensure_future(_exit_with(multiprocessing.parent_process())))
    elif threading.current_thread() is threading.main_thread():
        loop.add_signal_handler(signal.SIGHUP, partial(_reload_all, state))
    yield
    state.models.stopping = True
    await loading
    await asyncio.to_thread(state.models.close)
    state.metrics.mark_ended()
    log("stopped")


def _drain_worker(state: AppState, stop: Any) -> None:
    """Handles a worker process's SIGTERM: it asks clients to go elsewhere, still accepts requests
    for a while, and then stops as uvicorn does. (`run.DrainingServer` does this for one process.)
    """
    if not state.models.stopping:
        state.models.stopping = True
        loop = asyncio.get_running_loop()
        loop.call_later(state.limits.drain_s, stop, signal.SIGTERM, None)


async def _exit_with(parent: multiprocessing.process.BaseProcess | None) -> None:
    """Ends a worker process whose parent was killed: nothing could reload or stop it."""
    assert parent is not None
    while os.getppid() == parent.pid:
        await asyncio.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def _load(state: AppState) -> None:
    try:
        state.models.load(_log_loaded)
    except BaseException as error:
        state.startup_error = error
        state.stop()
        return
    state.refresh_gauges()
    log("ready", models=",".join(state.models.names))


def _log_loaded(metadata: ModelMetadata, plan: SessionPlan) -> None:
    runs = f"{metadata.backend}, {metadata.device}, {metadata.precision}"
    log("loaded", model=metadata.name, runs=runs, plan=str(plan))


def _reload_all(state: AppState) -> None:
    """Handles SIGHUP."""
    for name in state.models.names:
        task = asyncio.ensure_future(_reload(state, name))
        _TASKS.add(task)
        task.add_done_callback(_TASKS.discard)


async def _reload(state: AppState, name: str) -> None:
    try:
        metadata = await state.models.reload(name)
    except UserError as error:
        LOG.error(f"not reloaded: {error}", extra={"fields": {"model": name}})
    else:
        log("reloaded", model=name, version=metadata.version)


async def _page() -> HTMLResponse:
    page, policy = render_page()
    return HTMLResponse(
        page, headers={"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}
    )


async def _metrics(request: Request) -> PlainTextResponse:
    """Prometheus's metrics."""
    state = app_state(request)
    state.refresh_gauges()
    return PlainTextResponse(state.metrics.text(), media_type=state.metrics.content_type)


def _on_refusal(_: Request, error: Any) -> Response:
    return refusal_response(error)


def _on_user_error(_: Request, error: Any) -> Response:
    """E.g. images that the runtime can't take."""
    return refusal_response(BadRequest(str(error)))


def _on_client_gone(_: Request, __: Any) -> Response:
    return Response(status_code=CLIENT_GONE)


def _on_invalid(_: Request, error: Any) -> Response:
    fault = error.errors()[0]
    where = ".".join(str(part) for part in fault["loc"][1:]) or "the request"
    reason = str(fault["msg"]).removeprefix("Value error, ")
    return refusal_response(BadRequest(f"{where}: {reason[:1].lower()}{reason[1:]}"))


def _on_http_exception(request: Request, error: Any) -> Response:
    message = str(error.detail)
    if error.status_code == 404:
        message = f"no such address: {request.url.path[:200]} (/docs lists all)"
    elif error.status_code == 405:
        message = f"{request.url.path[:200]} does not take {request.method}"
    return JSONResponse({"error": message}, error.status_code, error.headers)
