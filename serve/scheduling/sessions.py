"""A model's source, and the open sessions of a layout."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from srdeploy.serve.runtime import Runtime, open_runtime
from srdeploy.serve.scheduling.plan import Layout
from srdeploy.spec import Spec


@dataclass(frozen=True)
class Source:
    """Where a served model comes from; it is opened again at each reload."""

    name: str
    path: Path
    device: str = "cpu"
    runtime: str = "auto"
    spec: Spec | None = None
    """For ONNX files that carry none."""
    precision: str | None = None

    def runtime_of(self, threads: int | None) -> Runtime:
        """A runtime that is not open yet. Raises UserError as open_runtime."""
        return open_runtime(
            self.path, self.device, self.runtime, self.spec, threads, self.precision
        )


@contextmanager
def open_sessions(source: Source, layout: Layout) -> Iterator[list[Runtime]]:
    """The layout's runtimes, open. One that several threads may run at once, each on itself alone,
    stands for all of them: its weights are in memory once. Raises UserError as open_runtime."""
    with ExitStack() as stack:
        first = stack.enter_context(source.runtime_of(layout.threads))
        if first.shareable and layout.threads == 1:
            yield [first] * layout.sessions
            return
        others = [source.runtime_of(layout.threads) for _ in range(layout.sessions - 1)]
        yield [first, *(stack.enter_context(other) for other in others)]
