"""Who does the work: this process, or a cluster."""

from collections.abc import Generator, Iterator
from typing import Protocol

from srdeploy.pillow_remarks import ignore_remarks
from srdeploy.serve.folders.local_store import open_store
from srdeploy.serve.folders.photo import Photo
from srdeploy.serve.folders.record import Record
from srdeploy.serve.folders.settings import PredictSettings
from srdeploy.serve.folders.worker import Worker, folder_plan
from srdeploy.serve.scheduling.sessions import Source


class Engine(Protocol):
    """Turns photos into outputs. What it says of itself is known once the first record is there."""

    name: str
    sessions: int
    """That run side by side."""
    threads: int | None
    """CPU threads of each."""
    batch: int
    """Photos in one run, at most."""

    def records(
        self,
        source: Source,
        photos: Iterator[Photo],
        expected: int,
        out: str,
        settings: PredictSettings,
    ) -> Generator[Record]:
        """What became of each photo, as they are done. `expected`: about how many photos there are.

        When it is closed, what has not begun is dropped. Raises UserError where the artifact can't
        be run, and OutputError.
        """


class LocalEngine:
    """This process: sessions side by side, and threads that decode and encode."""

    name = "local"

    def __init__(self, threads: int | None = None, batch: int | None = None) -> None:
        """threads: of each session; batch: photos in one run; None: what does most in a second."""
        self.sessions = 0
        self.threads = threads
        self.batch = batch or 1
        self._wishes = threads, batch

    def records(
        self,
        source: Source,
        photos: Iterator[Photo],
        expected: int,
        out: str,
        settings: PredictSettings,
    ) -> Generator[Record]:
        """See Engine. Silences Pillow's remarks on damaged files, for the whole process."""
        ignore_remarks()
        plan = folder_plan(source, expected, *self._wishes)
        self.sessions, self.batch = plan.shared.sessions, plan.batch
        self.threads = plan.shared.threads
        with Worker(source, plan, settings, open_store(out)) as worker:
            yield from worker.records(photos)
