"""The job: find the photos, go through those that are not done, keep the manifest, and tell what
came of it."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from typing import BinaryIO

from srdeploy import __version__
from srdeploy.files import sha256_of
from srdeploy.interrupt import StopRequest
from srdeploy.serve.folders.areas import check_areas, write_areas
from srdeploy.serve.folders.engine import Engine, LocalEngine
from srdeploy.serve.folders.key import write_key
from srdeploy.serve.folders.listing import Listing, find_photos
from srdeploy.serve.folders.local_store import open_store
from srdeploy.serve.folders.manifest import Header, Manifest, open_manifest
from srdeploy.serve.folders.meter import Meter
from srdeploy.serve.folders.photo import Photo
from srdeploy.serve.folders.record import Record
from srdeploy.serve.folders.settings import PredictSettings
from srdeploy.serve.folders.store import OutputError
from srdeploy.serve.folders.summary import Summary, Tally
from srdeploy.serve.folders.views import with_views
from srdeploy.serve.scheduling.sessions import Source


def predict_photos(
    source: Source,
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
        probe = source.runtime_of(None)
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
