"""What clients are told of a model."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from srdeploy.graph.signature import Shape
from srdeploy.runtimes.base import Runtime
from srdeploy.serve.scheduling.jobs import DeadlineError, Job, Task
from srdeploy.serve.scheduling.lanes import LoadedModel
from srdeploy.serve.scheduling.planner import Plan, Source, Wishes, make_plan
from srdeploy.serve.scheduling.scheduler import Scheduler
from srdeploy.serve.server.admission import Busy, Expired, NotFound
from srdeploy.spec import Spec


@dataclass(frozen=True)
class ModelCard:
    """One loaded model: its place in addresses, and what it takes and gives."""

    name: str
    version: str
    """"1" after the start, one more after each reload."""
    spec: Spec
    backend: str
    device: str
    precision: str
    input_shape: Shape
    """(N, H, W, 3) of the images; None: any."""

    @classmethod
    def of(cls, name: str, version: int, runtime: Runtime) -> "ModelCard":
        """The card of an open runtime."""
        return cls(
            name,
            str(version),
            runtime.spec,
            runtime.backend,
            runtime.device,
            runtime.precision,
            runtime.input_shape,
        )


# The models that a server has: started, asked, reloaded and closed.


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


@dataclass(frozen=True)
class _Loaded:
    """One model that answers."""

    card: ModelCard
    model: LoadedModel


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
        self._loaded: dict[str, _Loaded] = {}
        self._loading = threading.Lock()
        self.scheduler = Scheduler(codec_threads=max(2, cores))
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
        return [entry.card for entry in self._loaded.values()]

    @property
    def plans(self) -> dict[str, Plan]:
        """Of the loaded models."""
        return {name: entry.model.plan for name, entry in self._loaded.items()}

    def waiting_images(self) -> dict[str, int]:
        """Jobs that wait for a codec thread or a lane, by model."""
        return {name: entry.model.lanes.queue.waiting for name, entry in self._loaded.items()}

    def load(self, tell: Callable[[ModelCard, Plan], None]) -> None:
        """Measures, loads and warms up every model; on a thread of its own. Raises UserError."""
        for name, source in self._sources.items():
            with self._loading:
                plan = self._plans.get(name) or make_plan(source, self._cores, self._wishes)
                entry = self._open(source, plan, version=1)
            self._loaded[name] = entry
            tell(entry.card, plan)

    async def reload(self, name: str) -> ModelCard:
        """Opens the artifact again, and turns requests to it once it is warmed up; those that were
        taken before are answered by the old one. Raises UserError; the old one then stays."""
        old = self._entry(name)
        version = int(old.card.version) + 1
        new = await asyncio.to_thread(self._open_again, old, version)
        if self._loaded.get(name) is not old or self.stopping:
            await asyncio.to_thread(new.model.close)
            raise Busy(f"model '{name}' was reloaded, or the server stopped, meanwhile", 1)
        self._loaded[name] = new
        await asyncio.to_thread(old.model.close)
        return new.card

    def _open_again(self, old: _Loaded, version: int) -> _Loaded:
        with self._loading:
            return self._open(old.model.source, old.model.plan, version)

    def _open(self, source: Source, plan: Plan, version: int) -> _Loaded:
        model = LoadedModel(self.scheduler, source, plan)
        return _Loaded(ModelCard.of(source.name, version, model.runtime), model)

    def card(self, name: str | None) -> ModelCard:
        """Of the model `name`, or of the first. Raises NotFound, or Busy while it loads."""
        return self._entry(name).card

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
        queue = self._entry(name).model.lanes.queue
        loop = asyncio.get_running_loop()
        group = _Group(loop.create_future(), len(tasks))
        deadline = time.monotonic() + timeout_s
        done = partial(_tell, loop, group)
        group.jobs = [self.scheduler.submit(queue, task, deadline, done) for task in tasks]
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
            if isinstance(job.error, DeadlineError):
                raise Expired(str(job.error), retry_after=1) from job.error
            if job.error is not None:
                raise job.error
        return group.jobs

    def close(self) -> None:
        """Finishes what was submitted, and frees all models; on a thread of its own."""
        with self._loading:
            for entry in self._loaded.values():
                entry.model.close()
            self._loaded.clear()
        self.scheduler.stop()

    def _entry(self, name: str | None) -> _Loaded:
        wanted = name if name is not None else next(iter(self._sources))
        if wanted not in self._sources:
            raise NotFound(f"no model '{wanted[:80]}': this server has {', '.join(self.names)}")
        entry = self._loaded.get(wanted)
        if entry is None:
            raise Busy(f"model '{wanted}' is not ready: it is being loaded, or unloaded", 1)
        return entry


def _tell(loop: asyncio.AbstractEventLoop, group: _Group, _: Job) -> None:
    """From a codec thread to the event loop."""
    try:
        loop.call_soon_threadsafe(group.settle)
    except RuntimeError:
        return  # the loop was closed in a hurry: nobody waits
