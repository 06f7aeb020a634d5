"""Prediction over folders: finds photos, runs those that are not done, keeps the manifest."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from typing import BinaryIO, Protocol

from srdeploy import __version__
from srdeploy.files import sha256_of
from srdeploy.imaging import ignore_pillow_warnings
from srdeploy.interrupt import StopRequest
from srdeploy.serve.folders.listing import Listing, find_photos
from srdeploy.serve.folders.manifest import Manifest, ManifestHeader, open_manifest
from srdeploy.serve.folders.records import Photo, Record
from srdeploy.serve.folders.rendering import check_areas, with_views, write_areas, write_key
from srdeploy.serve.folders.settings import PredictSettings
from srdeploy.serve.folders.stores import OutputError, open_store
from srdeploy.serve.folders.summary import JobStats, ProgressReporter, Summary
from srdeploy.serve.folders.worker import Worker, folder_plan
from srdeploy.serve.scheduling.planner import ModelSource


class Executor(Protocol):
    """Turns photos into outputs. Its attributes are known once the first record is there."""

    name: str
    sessions: int
    """Parallel sessions."""
    threads: int | None
    """CPU threads of each."""
    batch: int
    """Photos in one run, at most."""

    def records(
        self,
        source: ModelSource,
        photos: Iterator[Photo],
        expected: int,
        out: str,
        settings: PredictSettings,
    ) -> Generator[Record]:
        """The record of each photo, as it is done. `expected`: about how many photos there are.

        When the generator is closed, photos that have not begun are dropped. Raises UserError if
        the artifact can't be run, and OutputError.
        """


def predict_photos(
    source: ModelSource,
    photos: Sequence[str],
    out: str,
    settings: PredictSettings | None = None,
    *,
    executor: Executor | None = None,
    list_file: str | None = None,
    stdin: BinaryIO | None = None,
    force: bool = False,
) -> Summary:
    """Writes masks, and what else `settings` ask for, of all photos below `out`.

    photos: files, folders, globs, URLs, and "-" for a list on `stdin`; see `find_photos`, which
    also says what the outputs are called. out: a folder or a URL. executor: None: this process.
    What an earlier run of the same job has done is kept, unless `force`. Unreadable photos are
    reported and skipped. SIGINT and SIGTERM end the job after in-flight photos are written.
    Raises UserError where the sources, the artifact or the output can't be used; what was written
    until then is whole, and in the manifest.
    """
    settings = settings or PredictSettings()
    executor = executor or LocalExecutor()
    check_areas(settings.areas)
    with find_photos(photos, out, list_file, stdin) as listing, ExitStack() as stack:
        store = open_store(out)
        probe = source.make_runtime(None)
        with_views(probe, settings, 1)  # refuse before anything is written
        header = ManifestHeader(
            srdeploy=__version__,
            artifact=str(source.path),
            artifact_sha256=sha256_of(probe.artifact.file),
            runtime=probe.backend,
            precision=source.precision or probe.precision,
            settings=settings,
        )
        manifest = stack.enter_context(open_manifest(store, header, force))
        write_key(store, probe.spec)
        stop = stack.enter_context(
            StopRequest("finishing the photos in flight; once more to stop at once")
        )
        stats = JobStats()
        for unusable in listing.unusable():
            record = Record(Photo(unusable.path, "", 0, 0), error=unusable.reason)
            manifest.add(record)
            stats.add(record)
        todo = _todo(listing, manifest, stats, stop)
        expected = max(0, len(listing) - manifest.continued)
        total = len(listing) + listing.unusable_count
        with (
            ProgressReporter(total, stats) as progress,
            closing(executor.records(source, todo, expected, out, settings)) as records,
        ):
            try:
                for record in records:
                    manifest.add(record)
                    stats.add(record)
                    progress.advance()
            except OutputError as error:
                raise OutputError(
                    f"{error} ({stats.images + stats.done_before:,} photos are done, "
                    "and the same command resumes there)"
                ) from error
        seconds, images_per_s = stats.seconds, stats.images_per_s
        if settings.areas != "none":
            write_areas(store, manifest.records(), probe.spec, settings.areas)
    return Summary(
        out=out,
        engine=executor.name,
        images=stats.images,
        done_before=stats.done_before,
        skipped_count=stats.skipped_count,
        skipped=tuple(stats.skipped),
        left=total - stats.handled,
        seconds=seconds,
        images_per_s=images_per_s,
        decode_s=stats.decode_ms / 1000,
        run_s=stats.run_ms / 1000,
        encode_s=stats.encode_ms / 1000,
        sessions=executor.sessions,
        threads=executor.threads,
        batch=executor.batch,
    )


class LocalExecutor:
    """Runs in this process: parallel sessions, and threads that decode and encode."""

    name = "local"

    def __init__(self, threads: int | None = None, batch: int | None = None) -> None:
        """threads: of each session; batch: photos in one run; None: the fastest."""
        self.sessions = 0
        self.threads = threads
        self.batch = batch or 1
        self._options = threads, batch

    def records(
        self,
        source: ModelSource,
        photos: Iterator[Photo],
        expected: int,
        out: str,
        settings: PredictSettings,
    ) -> Generator[Record]:
        """See Executor. Silences Pillow's warnings on damaged files, for the whole process."""
        ignore_pillow_warnings()
        plan = folder_plan(source, expected, *self._options)
        self.sessions, self.batch = plan.shared.sessions, plan.batch
        self.threads = plan.shared.threads
        with Worker(source, plan, settings, open_store(out)) as worker:
            yield from worker.records(photos)


def _todo(
    listing: Listing, manifest: Manifest, stats: JobStats, stop: StopRequest
) -> Iterator[Photo]:
    """The photos that are not done yet, until the job is told to stop."""
    stats.begin()
    for photo in listing:
        if stop.requested:
            return
        if manifest.is_done(photo):
            stats.done_before += 1
        else:
            yield photo
