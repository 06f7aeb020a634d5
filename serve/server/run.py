"""Runs a server until it is told to stop: one process, or a parent with worker processes."""

import asyncio
import os
import signal
import socket
from tempfile import TemporaryDirectory
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.supervisors.multiprocess import Multiprocess

from srdeploy.errors import UserError
from srdeploy.imaging import ignore_pillow_warnings
from srdeploy.serve.scheduling.planner import SessionPlan, make_plan
from srdeploy.serve.server.app import make_app, make_state
from srdeploy.serve.server.config import ServerConfig
from srdeploy.serve.server.metrics import WORKERS_FOLDER
from srdeploy.serve.server.server_log import log, start_log
from srdeploy.serve.server.state import AppState

CONFIG_VARIABLE = "SRDEPLOY_SERVER_CONFIG"
"""Environment variable with the configuration that the parent passes to its workers."""
BACKLOG = 2048
"""Connections that the kernel queues until they are accepted: bursts must not be turned away."""
WORKER_START_S = 600
"""After this long a worker counts as hung: large models take their time to load."""
LINGER_S = 0.25
"""From the last accepted connection until idle ones are closed: a request may be on its way."""


class DrainingServer(uvicorn.Server):
    """A uvicorn server that drains in-flight requests on SIGTERM: for a while it still accepts
    requests and asks clients to go elsewhere, so that no client finds its connection cut."""

    def __init__(self, config: uvicorn.Config, state: AppState) -> None:
        super().__init__(config)
        self._state = state
        state.stop = self._stop

    def _stop(self) -> None:
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Reports not ready, drains, and then stops as uvicorn does."""
        self._state.models.stopping = True
        log("stopping", waiting=self._state.admission.requests)
        if self._state.startup_error is None and not self.force_exit:
            await asyncio.sleep(self._state.limits.drain_s)
            for server in self.servers:
                server.close()
            await asyncio.sleep(LINGER_S)
        await super().shutdown(sockets)


def run_server(config: ServerConfig) -> None:
    """Serves until SIGTERM or SIGINT, and then drains in-flight requests.

    Raises UserError if the address can't be used or a model can't be run.
    """
    start_log(config.log, config.quiet)
    ignore_pillow_warnings()
    for source in config.sources:
        source.make_runtime(None)  # bad sources are refused before an address is taken
    with _listen(config) as listener:
        if config.workers > 1:
            _run_workers(config, listener)
        else:
            _run_single(config, listener)


def make_worker() -> ASGIApp:
    """The application of one worker process, as its parent configured it."""
    config = ServerConfig.model_validate_json(os.environ[CONFIG_VARIABLE])
    start_log(config.log, config.quiet)
    ignore_pillow_warnings()
    return make_app(config, make_state(config))


def _run_single(config: ServerConfig, listener: socket.socket) -> None:
    state = make_state(config)
    app = make_app(config, state)
    # uvicorn sends itself the signal again once it has stopped, which must not kill the process.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _ignore)
    _log_address(config, listener)
    DrainingServer(uvicorn.Config(app, **_options(config)), state).run([listener])
    if state.startup_error is not None:
        raise state.startup_error


def _run_workers(config: ServerConfig, listener: socket.socket) -> None:
    """Measures plans once, here, with a worker's share of the cores."""
    plans: dict[str, SessionPlan] = {}
    for source in config.sources:
        plans[source.name] = make_plan(source, config.cores, config.constraints)
        log("planned", model=source.name, plan=str(plans[source.name]))
    shared = config.model_copy(update={"plans": plans})
    with TemporaryDirectory(prefix="srdeploy-metrics-") as folder:
        os.environ[WORKERS_FOLDER] = folder
        os.environ[CONFIG_VARIABLE] = shared.model_dump_json()
        _log_address(config, listener)
        options = _options(config) | {"workers": config.workers, "factory": True}
        options["timeout_worker_healthcheck"] = WORKER_START_S
        settings = uvicorn.Config("srdeploy.serve.server.run:make_worker", **options)
        supervisor = Multiprocess(settings, sockets=[listener])
        supervisor.run()
        for process in supervisor.processes:
            if process.exitcode not in (0, -signal.SIGTERM, -signal.SIGINT):
                raise UserError("a worker could not start, or died: its reason is above")


def _options(config: ServerConfig) -> dict[str, Any]:
    return {
        "loop": "uvloop",
        "http": "httptools",
        "ws": "none",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "backlog": BACKLOG,
        "timeout_graceful_shutdown": int(config.limits.timeout_s) + 5,
    }


def _listen(config: ServerConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except (OSError, UnicodeError) as error:
        listener.close()
        raise UserError(
            f"can't listen on {config.host} port {config.port} "
            f"({getattr(error, 'strerror', None) or error}): give another --host or --port"
        ) from error
    listener.listen(BACKLOG)
    listener.set_inheritable(True)
    return listener


def _log_address(config: ServerConfig, listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    log("listening", address=f"http://{host}:{port}", workers=config.workers)


def _ignore(number: int, frame: object) -> None:
    pass
