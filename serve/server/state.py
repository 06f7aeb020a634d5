"""What the routes share: the application's state, and the context of one request."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from starlette.requests import Request

from srdeploy.serve.scheduling.scheduler import STEPS, Task, WorkItem
from srdeploy.serve.server.admission import AdmissionControl
from srdeploy.serve.server.config import ServerLimits
from srdeploy.serve.server.metrics import ServerMetrics
from srdeploy.serve.server.page import PageSample
from srdeploy.serve.server.registry import ModelRegistry


@dataclass(eq=False)
class RequestContext:
    """One request's data for its log line and metrics, kept in the ASGI scope's state."""

    id: str
    body_bytes: int = 0
    model: str = ""
    items: Sequence[WorkItem] = ()

    def milliseconds(self) -> dict[str, float]:
        """The time of each step, summed over the request's images."""
        return {step: sum(getattr(item.timing, step) for item in self.items) for step in STEPS}


def _not_running() -> None:
    """What `stop` does before a server runs the application."""


@dataclass(eq=False)
class AppState:
    """One server process's state, kept in the application's state."""

    models: ModelRegistry
    limits: ServerLimits
    admission: AdmissionControl
    metrics: ServerMetrics
    samples: list[PageSample]
    key_needed: bool
    reloads_here: bool
    """False with several worker processes: their parent reloads them all."""
    startup_error: BaseException | None = None
    """Why the server can't start."""
    stop: Callable[[], None] = _not_running
    """Ends the server, as SIGTERM does."""

    def refresh_gauges(self) -> None:
        """Sets the metrics that describe the present. With several worker processes any of them
        answers for all, so each keeps its own metrics up to date."""
        self.metrics.waiting.set(self.admission.requests)
        self.metrics.ready.set(int(self.models.ready))
        for name, count in self.models.waiting_images().items():
            self.metrics.queued.labels(name).set(count)

    async def run(
        self, request: Request, model: str, tasks: Sequence[Task[Any]], timeout_s: float | None
    ) -> list[Any]:
        """The answers to all tasks of a request. Raises like ModelRegistry.run."""
        context = request_context(request)
        timeout_s = min(timeout_s or self.limits.timeout_s, self.limits.timeout_s)
        disconnected = asyncio.ensure_future(_until_disconnected(request))
        try:
            context.items = await self.models.run(model, tasks, timeout_s, disconnected)
        except Exception:
            self.metrics.stats(model).failures += 1
            raise
        finally:
            disconnected.cancel()
        self.metrics.observe(model, context.items)
        return [item.answer for item in context.items]


def app_state(request: Request) -> AppState:
    """The state of the application that received the request."""
    return cast(AppState, request.app.state.server)


def request_context(request: Request) -> RequestContext:
    """The request's own context, which the middleware made."""
    return cast(RequestContext, request.scope["state"]["context"])


async def _until_disconnected(request: Request) -> None:
    """Returns when the client closes its connection. The body must have been read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
