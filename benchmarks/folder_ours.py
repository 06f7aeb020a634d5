"""`srdeploy predict` over a folder of photos, as often as requested.

    python benchmarks/folder_ours.py deploy/night/model.onnx camvid/images/test

For each line `FOLDER` on stdin every photo is done into that folder, and {"images", "seconds",
"network_busy"} is answered. The seconds are the job's own: from the first photo asked for to the
last mask and its record written, with the network loaded. It stays loaded from job to job, as the
peers' do. With --anew each job opens it again, before those seconds begin: what a runtime leaves to
its first run, or to the first run of each size, is then in them.
"""

import json
import sys
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from srdeploy import console
from srdeploy.serve.folders.predict import Executor, LocalExecutor, predict_photos
from srdeploy.serve.folders.records import Photo, Record
from srdeploy.serve.folders.settings import PredictSettings
from srdeploy.serve.folders.stores import Store, open_store
from srdeploy.serve.folders.worker import Worker, folder_plan
from srdeploy.serve.scheduling.planner import ModelSource


class LatestStore:
    """The output folder of the job under way, for a worker that outlives it."""

    root = ""

    def begin(self, store: Store) -> None:
        """A job begins, whose outputs go there."""
        self._store = store
        self.root = store.root

    def write(self, path: str, content: bytes) -> None:
        """See Store."""
        self._store.write(path, content)

    def write_file(self, path: str, source: Path) -> None:
        """See Store."""
        self._store.write_file(path, source)

    def size(self, path: str) -> int | None:
        """See Store."""
        return self._store.size(path)


class KeptExecutor:
    """LocalExecutor, whose worker stays open for the next job of the same kind."""

    name = "local"

    def __init__(self, stack: ExitStack) -> None:
        """stack: closes the worker."""
        self.sessions = 0
        self.threads: int | None = None
        self.batch = 1
        self._stack = stack
        self._store = LatestStore()
        self._worker: Worker | None = None

    def records(
        self,
        source: ModelSource,
        photos: Iterator[Photo],
        expected: int,
        out: str,
        settings: PredictSettings,
    ) -> Generator[Record]:
        """See Executor."""
        self._store.begin(open_store(out))
        if self._worker is None:
            plan = folder_plan(source, expected, None, None)
            self.sessions, self.batch = plan.shared.sessions, plan.batch
            self.threads = plan.shared.threads
            self._worker = self._stack.enter_context(Worker(source, plan, settings, self._store))
        yield from self._worker.records(photos)


def main(
    graph: Annotated[Path, typer.Argument(help="The ONNX file.")],
    photos: Annotated[Path, typer.Argument(help="Folder of photos.")],
    runtime: Annotated[str, typer.Option(help="onnxruntime or openvino.")] = "onnxruntime",
    precision: Annotated[str, typer.Option(help="Of OpenVINO: fp32, bf16, fp16.")] = "fp32",
    anew: Annotated[bool, typer.Option("--anew", help="Each job opens the network.")] = False,
) -> None:
    """Do all photos into each FOLDER that stdin names, until it ends."""
    console.set_quiet(True)
    chosen = precision if runtime == "openvino" else None
    source = ModelSource("predict", graph, runtime=runtime, precision=chosen)
    with ExitStack() as stack:
        executor: Executor = LocalExecutor() if anew else KeptExecutor(stack)
        print("ready", flush=True)
        for line in sys.stdin:
            out, settings = line.rstrip("\n"), PredictSettings()
            done = predict_photos(
                source, [str(photos)], out, settings, executor=executor, force=True
            )
            told = {"images": done.images, "seconds": done.seconds}
            print(json.dumps(told | {"network_busy": done.network_busy}), flush=True)


if __name__ == "__main__":
    typer.run(main)
