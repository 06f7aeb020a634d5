"""The models of one server process: loaded, run, reloaded and closed."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from srdeploy.graph.signature import Shape
from srdeploy.runtimes.base import Runtime
from srdeploy.serve.scheduling.planner import ModelSource, PlanConstraints, SessionPlan, make_plan
from srdeploy.serve.scheduling.scheduler import DeadlineError, Scheduler, Task, WorkItem
from srdeploy.serve.scheduling.workers import LoadedModel
from srdeploy.serve.server.admission import DeadlineExceeded, NotFound, Unavailable
from srdeploy.spec import Spec


class ClientGone(Exception):
    """The client closed its connection before the answer was there."""


@dataclass(frozen=True)
class ModelMetadata:
    """What clients are told about a loaded model."""

    name: str
    """Its name in URLs."""
    version: str
    """"1" after the start, one more after each reload."""
    spec: Spec
    backend: str
    device: str
    precision: str
    input_shape: Shape
    """(N, H, W, 3) of the images; None: any."""

    @classmethod
    def of(cls, name: str, version: int, runtime: Runtime) -> "ModelMetadata":
        """The metadata of an open runtime."""
        return cls(
            name,
            str(version),
            runtime.spec,
            runtime.backend,
            runtime.device,
            runtime.precision,
            runtime.input_shape,
        )


class ModelRegistry:
    """All models of one process, by name, and the scheduler that they share."""

    def __init__(
        self,
        sources: Sequence[ModelSource],
        cores: int,
        constraints: PlanConstraints,
        plans: dict[str, SessionPlan] | None = None,
    ) -> None:
        """plans: known plans, by model name; the other models' sessions are measured."""
        self._sources = {source.name: source for source in sources}
        self._cores = cores
        self._constraints = constraints
        self._plans = dict(plans or {})
        self._served: dict[str, _ServedModel] = {}
        self._loading = threading.Lock()
        self.scheduler = Scheduler(codec_threads=max(2, cores))
        self.stopping = False

    @property
    def ready(self) -> bool:
        """Whether every model is loaded and warmed up, and the server is not stopping."""
        return len(self._served) == len(self._sources) and not self.stopping

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all models, loaded or not, in the order that they were given."""
        return tuple(self._sources)

    @property
    def loaded(self) -> list[ModelMetadata]:
        """Metadata of the loaded models."""
        return [served.metadata for served in self._served.values()]

    @property
    def plans(self) -> dict[str, SessionPlan]:
        """Session plans of the loaded models, by name."""
        return {name: served.model.plan for name, served in self._served.items()}

    def metadata(self, name: str | None) -> ModelMetadata:
        """Metadata of the model `name`; None: of the first. Raises NotFound, or Unavailable while
        it loads."""
        return self._find(name).metadata

    def waiting_images(self) -> dict[str, int]:
        """Number of items that wait for a codec thread or a worker, by model."""
        return {name: served.model.workers.queue.waiting for name, served in self._served.items()}

    def load(self, on_loaded: Callable[[ModelMetadata, SessionPlan], None]) -> None:
        """Plans, loads and warms up every model; call it off the event loop. Raises UserError."""
        for name, source in self._sources.items():
            with self._loading:
                plan = self._plans.get(name) or make_plan(source, self._cores, self._constraints)
                served = self._open(source, plan, version=1)
            self._served[name] = served
            on_loaded(served.metadata, plan)

    async def reload(self, name: str) -> ModelMetadata:
        """Opens the artifact again, and switches requests to it once it is warmed up. Requests
        that were admitted before are answered by the old model. Raises UserError; the old model
        then stays."""
        old = self._find(name)
        version = int(old.metadata.version) + 1
        new = await asyncio.to_thread(self._open_again, old, version)
        if self._served.get(name) is not old or self.stopping:
            await asyncio.to_thread(new.model.close)
            raise Unavailable(f"model '{name}' was reloaded, or the server stopped, meanwhile", 1)
        self._served[name] = new
        await asyncio.to_thread(old.model.close)
        return new.metadata

    async def run(
        self,
        name: str | None,
        tasks: Sequence[Task[Any]],
        timeout_s: float,
        disconnected: "asyncio.Future[Any]",
    ) -> list[WorkItem]:
        """Runs all tasks of one request; their items, with answers. `disconnected` is done when the
        client closes its connection.

        Raises the first failed task's error, DeadlineExceeded, ClientGone, NotFound or Unavailable.
        """
        queue = self._find(name).model.workers.queue
        loop = asyncio.get_running_loop()
        group = _ItemGroup(loop.create_future(), len(tasks))
        deadline = time.monotonic() + timeout_s
        done = partial(_settle_threadsafe, loop, group)
        group.items = [self.scheduler.submit(queue, task, deadline, done) for task in tasks]
        try:
            await asyncio.wait(
                (group.future, disconnected),
                timeout=timeout_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not group.future.done():
                if disconnected.done():
                    raise ClientGone
                raise DeadlineExceeded(
                    f"no answer within {timeout_s:g} s: ask for less at once, or for more time",
                    retry_after=1,
                )
        finally:
            if not group.future.done():
                for item in group.items:
                    self.scheduler.cancel(item)
        for item in group.items:
            if isinstance(item.error, DeadlineError):
                raise DeadlineExceeded(str(item.error), retry_after=1) from item.error
            if item.error is not None:
                raise item.error
        return group.items

    def close(self) -> None:
        """Finishes what was submitted, and frees all models; call it off the event loop."""
        with self._loading:
            for served in self._served.values():
                served.model.close()
            self._served.clear()
        self.scheduler.stop()

    def _find(self, name: str | None) -> "_ServedModel":
        wanted = name if name is not None else next(iter(self._sources))
        if wanted not in self._sources:
            raise NotFound(f"no model '{wanted[:80]}': this server has {', '.join(self.names)}")
        served = self._served.get(wanted)
        if served is None:
            raise Unavailable(f"model '{wanted}' is not ready: it is being loaded or unloaded", 1)
        return served

    def _open(self, source: ModelSource, plan: SessionPlan, version: int) -> "_ServedModel":
        model = LoadedModel(self.scheduler, source, plan)
        return _ServedModel(ModelMetadata.of(source.name, version, model.runtime), model)

    def _open_again(self, old: "_ServedModel", version: int) -> "_ServedModel":
        with self._loading:
            return self._open(old.model.source, old.model.plan, version)


@dataclass(frozen=True)
class _ServedModel:
    """One model that answers requests."""

    metadata: ModelMetadata
    model: LoadedModel


@dataclass(eq=False)
class _ItemGroup:
    """The items of one request. Used only on the event loop's thread."""

    future: "asyncio.Future[None]"
    left: int
    items: list[WorkItem] = field(default_factory=list)

    def settle(self) -> None:
        """Counts one more finished item."""
        self.left -= 1
        if self.left == 0 and not self.future.done():
            self.future.set_result(None)


def _settle_threadsafe(loop: asyncio.AbstractEventLoop, group: _ItemGroup, _: WorkItem) -> None:
    """Passes a finished item from a codec thread to the event loop."""
    try:
        loop.call_soon_threadsafe(group.settle)
    except RuntimeError:
        return  # the loop was closed early: nobody waits
