"""What a worker process starts with."""

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
from srdeploy.serve.scheduling.planner import Plan, make_plan
from srdeploy.serve.server.app import make_app, make_desk
from srdeploy.serve.server.config import ServerConfig
from srdeploy.serve.server.desk import Desk
from srdeploy.serve.server.journal import log, start_log
from srdeploy.serve.server.metrics import WORKERS_FOLDER

CONFIG_VARIABLE = "SRDEPLOY_SERVER_CONFIG"
"""The environment's name of the configuration, which the parent hands down."""


def make_worker() -> ASGIApp:
    """The application of one worker, as its parent configured it."""
    config = ServerConfig.model_validate_json(os.environ[CONFIG_VARIABLE])
    start_log(config.log, config.quiet)
    ignore_pillow_warnings()
    return make_app(config, make_desk(config))


# Runs a server until it is told to stop: one process, or a parent with workers.

BACKLOG = 2048
"""Connections that the kernel holds until they are taken: bursts must not be turned away."""
WORKER_START_S = 600
"""Until a worker counts as hung: large models take their time to load."""


LINGER_S = 0.25
"""From the last connection taken to the end of those that have asked nothing: a request may be on
its way."""


class Server(uvicorn.Server):
    """uvicorn's, which for a while after SIGTERM still takes requests, and says that it won't: no
    client finds its connection cut."""

    def __init__(self, config: uvicorn.Config, desk: Desk) -> None:
        super().__init__(config)
        self._desk = desk
        desk.stop = self._stop

    def _stop(self) -> None:
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Turns not ready, drains, and then stops as uvicorn does."""
        self._desk.hub.stopping = True
        log("stopping", waiting=self._desk.gate.requests)
        if self._desk.fault is None and not self.force_exit:
            await asyncio.sleep(self._desk.limits.drain_s)
            for server in self.servers:
                server.close()
            await asyncio.sleep(LINGER_S)
        await super().shutdown(sockets)


def run_server(config: ServerConfig) -> None:
    """Serves until SIGTERM or SIGINT; requests taken in are answered first.

    Raises UserError where the address can't be used or a model can't be run.
    """
    start_log(config.log, config.quiet)
    ignore_pillow_warnings()
    for source in config.sources:
        source.runtime_of(None)  # refuses what can't work, before an address is taken
    with _listen(config) as listener:
        if config.workers > 1:
            _run_workers(config, listener)
        else:
            _run_here(config, listener)


def _run_here(config: ServerConfig, listener: socket.socket) -> None:
    desk = make_desk(config)
    app = make_app(config, desk)
    # uvicorn sends itself the signal again once it has stopped: that must not be the end of a
    # process that did what it was told.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _ignore)
    _tell_address(config, listener)
    Server(uvicorn.Config(app, **_options(config)), desk).run([listener])
    if desk.fault is not None:
        raise desk.fault


def _run_workers(config: ServerConfig, listener: socket.socket) -> None:
    """Plans are measured once, here, with a worker's share of the cores."""
    plans: dict[str, Plan] = {}
    for source in config.sources:
        plans[source.name] = make_plan(source, config.cores, config.wishes)
        log("planned", model=source.name, plan=str(plans[source.name]))
    shared = config.model_copy(update={"plans": plans})
    with TemporaryDirectory(prefix="srdeploy-metrics-") as folder:
        os.environ[WORKERS_FOLDER] = folder
        os.environ[CONFIG_VARIABLE] = shared.model_dump_json()
        _tell_address(config, listener)
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


def _tell_address(config: ServerConfig, listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    log("listening", address=f"http://{host}:{port}", workers=config.workers)


def _ignore(number: int, frame: object) -> None:
    pass
