"""Who does the work: this process, or a cluster."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from typing import BinaryIO, Protocol

from srdeploy import __version__
from srdeploy.files import sha256_of
from srdeploy.imaging import ignore_pillow_warnings
from srdeploy.interrupt import StopRequest
from srdeploy.serve.folders.listing import Listing, find_photos
from srdeploy.serve.folders.manifest import Header, Manifest, open_manifest
from srdeploy.serve.folders.records import Photo, Record
from srdeploy.serve.folders.rendering import with_views, write_key
from srdeploy.serve.folders.settings import PredictSettings
from srdeploy.serve.folders.stores import OutputError, open_store
from srdeploy.serve.folders.summary import Meter, Summary, Tally, check_areas, write_areas
from srdeploy.serve.folders.worker import Worker, folder_plan
from srdeploy.serve.scheduling.planner import ModelSource


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
        source: ModelSource,
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
        source: ModelSource,
        photos: Iterator[Photo],
        expected: int,
        out: str,
        settings: PredictSettings,
    ) -> Generator[Record]:
        """See Engine. Silences Pillow's remarks on damaged files, for the whole process."""
        ignore_pillow_warnings()
        plan = folder_plan(source, expected, *self._wishes)
        self.sessions, self.batch = plan.shared.sessions, plan.batch
        self.threads = plan.shared.threads
        with Worker(source, plan, settings, open_store(out)) as worker:
            yield from worker.records(photos)


# The job: find the photos, go through those that are not done, keep the manifest, and tell what
# came of it.


def predict_photos(
    source: ModelSource,
    photos: Sequence[str],
    out: str,
    settings: PredictSettings | None = None,
    *,
    engine: Engine | None = None,
    list_file: str | None = None,
    stdin: BinaryIO | None = None,
    force: bool = False,
) -> Summary:
    """Writes masks, and what else `settings` ask for, of all photos below `out`.

    photos: files, folders, globs, URLs, and "-" for a list on `stdin`; see `find_photos`, which
    also says what the outputs are called. out: a folder or a URL. engine: None: this process.
    What an earlier run of the same job has done is kept, unless `force`. Photos that can't be used
    are told of and skipped. SIGINT and SIGTERM end the job once what is under way is written.
    Raises UserError where the sources, the artifact or the output can't be used; what was written
    until then is whole, and in the manifest.
    """
    settings = settings or PredictSettings()
    engine = engine or LocalEngine()
    check_areas(settings.areas)
    with find_photos(photos, out, list_file, stdin) as listing, ExitStack() as stack:
        store = open_store(out)
        probe = source.make_runtime(None)
        with_views(probe, settings, 1)  # what can be refused is refused before anything is written
        header = Header(
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
            StopRequest("finishing the photos under way; once more to stop at once")
        )
        tally = Tally()
        for unusable in listing.unusable():
            record = Record(Photo(unusable.path, "", 0, 0), error=unusable.reason)
            manifest.add(record)
            tally.take(record)
        todo = _todo(listing, manifest, tally, stop)
        expected = max(0, len(listing) - manifest.continued)
        total = len(listing) + listing.unusable_count
        with (
            Meter(total, tally) as meter,
            closing(engine.records(source, todo, expected, out, settings)) as records,
        ):
            try:
                for record in records:
                    manifest.add(record)
                    tally.take(record)
                    meter.move()
            except OutputError as error:
                raise OutputError(
                    f"{error} ({tally.images + tally.done_before:,} photos are done, "
                    "and the same command goes on from there)"
                ) from error
        seconds, images_per_s = tally.seconds, tally.images_per_s
        if settings.areas != "none":
            write_areas(store, manifest.records(), probe.spec, settings.areas)
    return Summary(
        out=out,
        engine=engine.name,
        images=tally.images,
        done_before=tally.done_before,
        skipped_count=tally.skipped_count,
        skipped=tuple(tally.skipped),
        left=total - tally.handled,
        seconds=seconds,
        images_per_s=images_per_s,
        decode_s=tally.decode_ms / 1000,
        run_s=tally.run_ms / 1000,
        encode_s=tally.encode_ms / 1000,
        sessions=engine.sessions,
        threads=engine.threads,
        batch=engine.batch,
    )


def _todo(listing: Listing, manifest: Manifest, tally: Tally, stop: StopRequest) -> Iterator[Photo]:
    """The photos that are not done, until the job is told to stop."""
    tally.begin()
    for photo in listing:
        if stop.requested:
            return
        if manifest.is_done(photo):
            tally.done_before += 1
        else:
            yield photo
