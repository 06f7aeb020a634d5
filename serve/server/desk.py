"""What the routes share: models, limits, counters, and one visit's record."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from starlette.requests import Request

from srdeploy.serve.scheduling.jobs import STEPS, Job, Task
from srdeploy.serve.server.admission import Gate, Limits
from srdeploy.serve.server.metrics import Watch
from srdeploy.serve.server.page import Sample
from srdeploy.serve.server.registry import Hub


@dataclass(eq=False)
class Visit:
    """One request, for its log line and metrics. It lies in the ASGI scope's state."""

    id: str
    body_bytes: int = 0
    model: str = ""
    jobs: Sequence[Job] = ()

    def milliseconds(self) -> dict[str, float]:
        """The time of each step, summed over the request's images."""
        return {step: sum(getattr(job.timing, step) for job in self.jobs) for step in STEPS}


def _nobody_to_tell() -> None:
    """Until there is a server around the application."""


@dataclass(eq=False)
class Desk:
    """One server's state. It lies in the application's state."""

    hub: Hub
    limits: Limits
    gate: Gate
    watch: Watch
    samples: list[Sample]
    key_needed: bool
    reloads_here: bool
    """False among several workers, which are reloaded together by their parent."""
    fault: BaseException | None = None
    """Why the server can't start."""
    stop: Callable[[], None] = _nobody_to_tell
    """Ends the server, as SIGTERM does."""

    def refresh_gauges(self) -> None:
        """Sets the metrics that say how things stand; with several workers, any of them is asked
        for all, so each keeps its own up to date."""
        self.watch.waiting.set(self.gate.requests)
        self.watch.ready.set(int(self.hub.ready))
        for name, count in self.hub.waiting_images().items():
            self.watch.queued.labels(name).set(count)

    async def run(
        self, request: Request, model: str, tasks: Sequence[Task[Any]], timeout_s: float | None
    ) -> list[Any]:
        """The answers to all tasks of a request. Raises as Hub.run."""
        visit = visit_of(request)
        gone = asyncio.ensure_future(_until_gone(request))
        try:
            visit.jobs = await self.hub.run(
                model, tasks, min(timeout_s or self.limits.timeout_s, self.limits.timeout_s), gone
            )
        except Exception:
            self.watch.tally(model).failures += 1
            raise
        finally:
            gone.cancel()
        self.watch.observe(model, visit.jobs)
        return [job.answer for job in visit.jobs]


def desk_of(request: Request) -> Desk:
    """The desk of the application that the request came to."""
    return cast(Desk, request.app.state.desk)


def visit_of(request: Request) -> Visit:
    """The request's own record."""
    return cast(Visit, request.scope["state"]["visit"])


async def _until_gone(request: Request) -> None:
    """Returns when the client has closed its connection. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
