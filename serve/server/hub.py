"""The models that a server has: started, asked, reloaded and closed."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from srdeploy.serve.server.card import ModelCard
from srdeploy.serve.server.job import Job
from srdeploy.serve.server.lanes import Lanes
from srdeploy.serve.server.plan import Plan
from srdeploy.serve.server.planner import Wishes, make_plan
from srdeploy.serve.server.refusals import Busy, Expired, NotFound
from srdeploy.serve.server.scheduler import Scheduler
from srdeploy.serve.server.sessions import Source
from srdeploy.serve.server.task import Task


class ClientGone(Exception):
    """The connection closed before the answer was there: there is nobody to tell."""


@dataclass(eq=False)
class _Group:
    """The jobs of one request. Touched on the event loop's thread alone."""

    future: "asyncio.Future[None]"
    left: int
    jobs: list[Job] = field(default_factory=list)

    def settle(self) -> None:
        """One more job is done."""
        self.left -= 1
        if self.left == 0 and not self.future.done():
            self.future.set_result(None)


class Hub:
    """All models of one process, by name, and the scheduler that they share."""

    def __init__(
        self,
        sources: Sequence[Source],
        cores: int,
        wishes: Wishes,
        plans: dict[str, Plan] | None = None,
    ) -> None:
        """plans: of models whose layout is known; the others are measured."""
        self._sources = {source.name: source for source in sources}
        self._cores = cores
        self._wishes = wishes
        self._plans = dict(plans or {})
        self._loaded: dict[str, Lanes] = {}
        self._loading = threading.Lock()
        self.scheduler = Scheduler(cores)
        self.stopping = False

    @property
    def ready(self) -> bool:
        """Whether every model is loaded and warmed up, and the server stays."""
        return len(self._loaded) == len(self._sources) and not self.stopping

    @property
    def names(self) -> tuple[str, ...]:
        """Of all models, loaded or not, in the order that they were given."""
        return tuple(self._sources)

    @property
    def cards(self) -> list[ModelCard]:
        """Of the loaded models."""
        return [lanes.card for lanes in self._loaded.values()]

    @property
    def plans(self) -> dict[str, Plan]:
        """Of the loaded models."""
        return {name: lanes.plan for name, lanes in self._loaded.items()}

    def waiting_images(self) -> dict[str, int]:
        """Jobs that wait for a codec thread or a lane, by model."""
        return {
            name: lanes.queue.arrived + lanes.queue.coming + len(lanes.queue.jobs)
            for name, lanes in self._loaded.items()
        }

    def load(self, tell: Callable[[ModelCard, Plan], None]) -> None:
        """Measures, loads and warms up every model; on a thread of its own. Raises UserError."""
        for name, source in self._sources.items():
            with self._loading:
                plan = self._plans.get(name) or make_plan(source, self._cores, self._wishes)
                lanes = Lanes(self.scheduler, source, plan, version=1)
            self._loaded[name] = lanes
            tell(lanes.card, plan)

    async def reload(self, name: str) -> ModelCard:
        """Opens the artifact again, and turns requests to it once it is warmed up; those that were
        taken before are answered by the old one. Raises UserError; the old one then stays."""
        old = self._lanes(name)
        version = int(old.card.version) + 1
        new = await asyncio.to_thread(self._open_again, old, version)
        if self._loaded.get(name) is not old or self.stopping:
            await asyncio.to_thread(new.close)
            raise Busy(f"model '{name}' was reloaded, or the server stopped, meanwhile", 1)
        self._loaded[name] = new
        await asyncio.to_thread(old.close)
        return new.card

    def _open_again(self, old: Lanes, version: int) -> Lanes:
        with self._loading:
            return Lanes(self.scheduler, old.source, old.plan, version)

    def card(self, name: str | None) -> ModelCard:
        """Of the model `name`, or of the first. Raises NotFound, or Busy while it loads."""
        return self._lanes(name).card

    async def run(
        self,
        name: str | None,
        tasks: Sequence[Task[Any]],
        timeout_s: float,
        gone: "asyncio.Future[Any]",
    ) -> list[Job]:
        """Runs all tasks of one request; their jobs, with answers. `gone` is done when the client
        is.

        Raises the first task's error where one failed, Expired, ClientGone, NotFound or Busy.
        """
        lanes = self._lanes(name)
        loop = asyncio.get_running_loop()
        group = _Group(loop.create_future(), len(tasks))
        deadline = time.monotonic() + timeout_s
        done = partial(_tell, loop, group)
        group.jobs = [self.scheduler.submit(lanes.queue, task, deadline, done) for task in tasks]
        try:
            await asyncio.wait(
                (group.future, gone), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if not group.future.done():
                if gone.done():
                    raise ClientGone
                raise Expired(
                    f"no answer within {timeout_s:g} s: ask for less at once, or for more time",
                    retry_after=1,
                )
        finally:
            if not group.future.done():
                for job in group.jobs:
                    self.scheduler.cancel(job)
        for job in group.jobs:
            if job.error is not None:
                raise job.error
        return group.jobs

    def close(self) -> None:
        """Finishes what was submitted, and frees all models; on a thread of its own."""
        with self._loading:
            for lanes in self._loaded.values():
                lanes.close()
            self._loaded.clear()
        self.scheduler.stop()

    def _lanes(self, name: str | None) -> Lanes:
        wanted = name if name is not None else next(iter(self._sources))
        if wanted not in self._sources:
            raise NotFound(f"no model '{wanted[:80]}': this server has {', '.join(self.names)}")
        lanes = self._loaded.get(wanted)
        if lanes is None:
            raise Busy(f"model '{wanted}' is not ready: it is being loaded, or unloaded", 1)
        return lanes


def _tell(loop: asyncio.AbstractEventLoop, group: _Group, _: Job) -> None:
    """From a codec thread to the event loop."""
    try:
        loop.call_soon_threadsafe(group.settle)
    except RuntimeError:
        return  # the loop was closed in a hurry: nobody waits
