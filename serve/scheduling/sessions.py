"""A model's source, and the open sessions of a layout."""

from collections.abc import Callable, Iterator
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
def open_sessions(
    source: Source, layout: Layout, wrap: Callable[[Runtime], Runtime] | None = None
) -> Iterator[list[Runtime]]:
    """The layout's runtimes, open. wrap: puts each into another. Raises UserError as open_runtime.

    Each has the weights in its own memory: threads that run one session of onnxruntime at once keep
    taking each other's buffers out of the caches, which cost 4 % where it was measured.
    """
    with ExitStack() as stack:
        runtimes = [source.runtime_of(layout.threads) for _ in range(layout.sessions)]
        if wrap is not None:
            runtimes = [wrap(runtime) for runtime in runtimes]
        yield [stack.enter_context(runtime) for runtime in runtimes]
