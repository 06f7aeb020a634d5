"""What is done: OUT/manifest.jsonl, from which a killed run resumes."""

import errno
import fcntl
import json
import os
import sqlite3
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import field_validator

from srdeploy import console
from srdeploy.errors import UserError
from srdeploy.files import explain_os_error
from srdeploy.serve.folders.paths import as_text, printable
from srdeploy.serve.folders.records import Photo, Record, from_line, name_and_verdict, to_line
from srdeploy.serve.folders.settings import PredictSettings
from srdeploy.serve.folders.stores import (
    LocalStore,
    OutputError,
    PeriodicUpload,
    RemoteStore,
    Store,
)
from srdeploy.validation import Settings

MANIFEST = "manifest.jsonl"
FREE = ("areas", "max_megapixels")
"""Settings that do not change the outputs of one photo, and may differ between runs."""
PAGE = 1000
"""Records that are looked up at once."""
CHUNK = 1 << 20
"""Bytes that are read at once."""


class ManifestHeader(Settings):
    """The first line of a manifest: what all its records have in common."""

    srdeploy: str
    """Version."""
    artifact: str
    """Name for messages; the digest decides."""
    artifact_sha256: str
    runtime: str
    precision: str
    settings: PredictSettings

    @field_validator("artifact", mode="before")
    @classmethod
    def _readable(cls, name: str) -> str:
        return as_text(name)


class Manifest:
    """The records of an output folder; made by `open_manifest`. A context manager. Threads may
    use it at once."""

    continued: int
    """Photos that were done before."""

    def __init__(self, store: Store, file: "AppendOnlyFile") -> None:
        self._store = store
        self._file = file
        self._stack = ExitStack()
        self._lock = threading.Lock()
        # "" is a file in the temporary folder that goes with the connection.
        self._index = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._index.execute("PRAGMA journal_mode=OFF")
        self._index.execute("PRAGMA cache_size=-32000")  # 32 MB
        self._index.execute(
            "CREATE TABLE record (name BLOB PRIMARY KEY, start INTEGER, length INTEGER, ok INTEGER)"
            " WITHOUT ROWID"
        )
        self._index.execute(
            "CREATE TABLE output (path BLOB PRIMARY KEY, bytes INTEGER) WITHOUT ROWID"
        )
        # It is never committed: each commit goes through all changed pages in memory.
        self._index.execute("BEGIN")
        self.continued = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Syncs the file, and uploads it. Raises OutputError."""
        self._stack.__exit__(kind, error, traceback)

    def close(self) -> None:
        """Drops the index."""
        self._index.close()

    def keep(self, stack: ExitStack) -> None:
        """Takes over what is closed together with the manifest, itself included."""
        self._stack = stack

    def is_done(self, photo: Photo) -> bool:
        """Whether the photo of that name, unchanged, has a record without error whose outputs are
        all there. Raises OutputError.

        Unchanged: of the same size and date, wherever it is found now, for people say `photos`
        today and `/home/me/photos` tomorrow; where dates are not told, also of the same path.
        """
        with self._lock:
            found = self._index.execute(
                "SELECT start, length FROM record WHERE name = ? AND ok", (os.fsencode(photo.name),)
            ).fetchone()
        if found is None:
            return False
        record = from_line(self._file.line_at(*found))
        before = record.photo
        if not before.changed_ns and before.path != photo.path:
            return False
        unchanged = (before.bytes, before.changed_ns) == (photo.bytes, photo.changed_ns)
        return unchanged and all(
            self._size(path) == output.bytes for path, output in record.outputs.items()
        )

    def add(self, record: Record) -> None:
        """Writes one line. Raises OutputError."""
        line = to_line(record)
        name = os.fsencode(record.photo.name)
        # What could not be listed has no name: a NUL is in no name.
        key = name or b"\0" + os.fsencode(record.photo.path)
        with self._lock:
            start = self._file.append(line)
            try:
                self._index.execute(
                    "REPLACE INTO record VALUES (?, ?, ?, ?)",
                    (key, start, len(line), record.error is None),
                )
            except sqlite3.OperationalError as error:
                raise _no_index(error) from error

    def records(self) -> Iterator[Record]:
        """The last record of each photo, by name, also of photos that are no longer among the
        sources; of what could not be listed, those of this run. Raises OutputError."""
        last = b""
        while True:
            with self._lock:
                page = self._index.execute(
                    "SELECT name, start, length FROM record WHERE name > ? ORDER BY name LIMIT ?",
                    (last, PAGE),
                ).fetchall()
            if not page:
                return
            for _, start, length in page:
                yield from_line(self._file.line_at(start, length))
            last = page[-1][0]

    def begin(self, header: ManifestHeader) -> None:
        """Starts a new manifest. Raises OutputError."""
        self._file.clear()
        values = header.model_dump(mode="json")
        self._file.append(json.dumps(values, ensure_ascii=False).encode() + b"\n")

    def load(self, header: ManifestHeader) -> None:
        """Takes over existing records; without any, starts a new manifest. Raises UserError if a
        line is damaged, or if the records do not fit `header`."""
        first = next(self._file.lines())[1]
        if len(first) == self._file.length and _is_header(first):
            self.begin(header)
            return
        try:
            self._index.executemany("REPLACE INTO record VALUES (?, ?, ?, ?)", self._rows(header))
            if isinstance(self._store, RemoteStore):
                self._index.executemany(
                    "REPLACE INTO output VALUES (?, ?)",
                    ((os.fsencode(path), size) for path, size in self._store.sizes()),
                )
        except sqlite3.OperationalError as error:
            raise _no_index(error) from error
        self.continued = self._index.execute("SELECT count(*) FROM record WHERE ok").fetchone()[0]

    def _rows(self, header: ManifestHeader) -> Iterator[tuple[bytes, int, int, bool]]:
        shown = self._file.shown
        for number, (start, line) in enumerate(self._file.lines(), 1):
            try:
                if number == 1:
                    _compare(json.loads(line), header, printable(self._store.root))
                    continue
                name, ok = name_and_verdict(line)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                if number == 1:
                    raise UserError(
                        f"{shown} is no manifest of predictions: choose another --out, or start "
                        "anew with --force"
                    ) from error
                raise UserError(
                    f"{shown}, line {number} is damaged: delete that line (its photo is done "
                    "again), or start anew with --force"
                ) from error
            if name:
                yield name, start, len(line), ok

    def _size(self, path: str) -> int | None:
        if not isinstance(self._store, RemoteStore):
            return self._store.size(path)
        with self._lock:
            found = self._index.execute(
                "SELECT bytes FROM output WHERE path = ?", (os.fsencode(path),)
            ).fetchone()
        return None if found is None else int(found[0])


def open_manifest(store: Store, header: ManifestHeader, force: bool) -> Manifest:
    """The manifest of the output folder; an existing one is continued. No other process can open it
    meanwhile, if the file system has locks.

    force: starts a new one; existing outputs are replaced as they are made. Leftovers of killed
    writes in a local folder are removed. Raises UserError if another process has it open, a line is
    damaged, or the records were made by another artifact, runtime, precision or with other
    settings; OutputError if it can't be written.
    """
    shown = printable(f"{store.root.rstrip('/')}/{MANIFEST}")
    with ExitStack() as stack:
        upload = None
        if isinstance(store, RemoteStore):
            path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / MANIFEST
            upload = stack.enter_context(PeriodicUpload(store, MANIFEST, path))
            if not force:
                store.read_file(MANIFEST, path)
        else:
            assert isinstance(store, LocalStore)
            store.make_folder()
            path = Path(store.folder) / MANIFEST
        file = stack.enter_context(AppendOnlyFile(path, shown))
        manifest = stack.enter_context(closing(Manifest(store, file)))
        was_there = file.length > 0
        if was_there and isinstance(store, LocalStore):
            store.remove_leftovers()
        if was_there and not force:
            manifest.load(header)
        else:
            manifest.begin(header)
        if upload is not None:
            upload.begin()
        manifest.keep(stack.pop_all())
    return manifest


class AppendOnlyFile:
    """A local file that grows by lines. A context manager; threads must take turns in `append`.

    Each line is written in one call, so that a process killed at any moment leaves whole lines and
    at most one without its end, which is dropped when the file is opened. It is synced when it is
    closed.
    """

    def __init__(self, path: Path | str, shown: str) -> None:
        """Opens or makes the file, and locks it until it is closed or the process ends. shown: its
        name for messages.

        File systems without locks are done without. Raises UserError where another process has it
        or it is no ordinary file, OutputError where it can't be written.
        """
        self.shown = shown
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:
            if os.path.lexists(path) and not stat.S_ISREG(os.stat(path).st_mode):
                raise UserError(f"{shown} is not an ordinary file: choose another --out")
            self._handle = os.open(path, flags, 0o666)
        except OSError as error:
            raise OutputError(str(explain_os_error(error, shown))) from error
        try:
            self._lock()
            self.length = self._drop_half_line()
        except BaseException:
            os.close(self._handle)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Raises OutputError where the disk did not take all."""
        try:
            try:
                os.fsync(self._handle)
            finally:
                os.close(self._handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # can't be synced
                raise OutputError(str(explain_os_error(error, self.shown))) from error

    def append(self, line: bytes) -> int:
        """Adds a line, which ends with \\n and has no other; returns where it begins. Raises
        OutputError, and the file is as before."""
        start = self.length
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._handle, rest) :]
        except OSError as error:
            os.ftruncate(self._handle, start)
            raise OutputError(str(explain_os_error(error, self.shown))) from error
        self.length += len(line)
        return start

    def clear(self) -> None:
        """Drops all lines. Raises OutputError."""
        try:
            os.ftruncate(self._handle, 0)
        except OSError as error:
            raise OutputError(str(explain_os_error(error, self.shown))) from error
        self.length = 0

    def line_at(self, start: int, length: int) -> bytes:
        """The bytes from `start` on. Raises OutputError."""
        try:
            return os.pread(self._handle, length, start)
        except OSError as error:
            raise OutputError(str(explain_os_error(error, self.shown))) from error

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """(start, line with its end) of each. Raises OutputError."""
        start, rest, place = 0, b"", 0
        while chunk := self.line_at(place, CHUNK):
            place += len(chunk)
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                yield start, line + b"\n"
                start += len(line) + 1

    def _lock(self) -> None:
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another prediction is writing there ({self.shown} is locked): wait for it, or "
                "choose another --out"
            ) from error
        except OSError:
            pass  # e.g. some network file systems, where users must avoid two runs themselves

    def _drop_half_line(self) -> int:
        """Cuts the file after its last line end; returns its length."""
        try:
            length = place = os.fstat(self._handle).st_size
            while place > 0:
                start = max(0, place - CHUNK)
                end = os.pread(self._handle, place - start, start).rfind(b"\n") + 1
                if end > 0:
                    place = start + end
                    break
                place = start
            if place < length:
                os.ftruncate(self._handle, place)
        except OSError as error:
            raise OutputError(str(explain_os_error(error, self.shown))) from error
        return place


def _is_header(line: bytes) -> bool:
    try:
        ManifestHeader.model_validate_json(line)
    except ValueError:
        return False
    return True


def _compare(before: dict[str, Any], header: ManifestHeader, root: str) -> None:
    """Raises UserError where records of the header `before` can't be taken; KeyError, TypeError or
    AttributeError where it is none."""
    now = header.model_dump(mode="json")
    usual = PredictSettings().model_dump(mode="json")
    settings = before["settings"]
    faults = []
    if before["artifact_sha256"] != now["artifact_sha256"]:
        faults.append(f"by another artifact ({before['artifact']})")
    faults += [
        f"with {key} {before[key]}, not {now[key]}"
        for key in ("runtime", "precision")
        if before[key] != now[key]
    ]
    for key in dict.fromkeys((*now["settings"], *settings)):
        # A version without that setting behaved like the default.
        old = settings.get(key, usual.get(key))
        new = now["settings"].get(key)
        if old != new and key not in FREE:
            faults.append(f"with {key} {json.dumps(old)}, not {json.dumps(new)}")
    if faults:
        raise UserError(
            f"{root} holds predictions made {' and '.join(faults)}: choose another --out, or do "
            "all photos again with --force"
        )
    if before["srdeploy"] != now["srdeploy"]:
        console.warn(
            f"{root} was begun by srdeploy {before['srdeploy']}, this is {now['srdeploy']}: its "
            "predictions are kept"
        )


def _no_index(error: Exception) -> OutputError:
    return OutputError(
        f"the index of the manifest in {tempfile.gettempdir()}: {error} (free some space there, "
        "or set TMPDIR)"
    )
