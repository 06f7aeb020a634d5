"""A local file whose copy on a remote file system is renewed now and then."""

import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from srdeploy import console
from srdeploy.serve.folders.remote_store import RemoteStore
from srdeploy.serve.folders.store import OutputError

EVERY_S = 30.0
"""Seconds between two uploads, at least."""
SHARE = 20
"""An upload that took a second is followed by the next after this many: the file of a million
photos has hundreds of MB."""


class Upload:
    """A context manager; once it has begun, the copy is complete when it is left."""

    def __init__(self, store: RemoteStore, path: str, source: Path) -> None:
        """path: in the store; source: the local file, to which others append."""
        self._store = store
        self._path = path
        self._source = source
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._uploaded = -1
        self._took = 0.0

    def __enter__(self) -> Self:
        return self

    def begin(self) -> None:
        """Uploads for the first time, and from now on. Raises OutputError."""
        self._renew()
        self._thread = threading.Thread(target=self._keep, name="manifest-upload", daemon=True)
        self._thread.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Raises OutputError, unless something else is already on its way."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        try:
            self._renew()
        except OutputError as failure:
            if kind is None:
                raise
            console.warn(f"the manifest could not be written: {failure}")

    def _keep(self) -> None:
        while not self._stop.wait(max(EVERY_S, SHARE * self._took)):
            with suppress(OutputError):  # where it lasts, the outputs or the last upload fail, too
                self._renew()

    def _renew(self) -> None:
        length = self._source.stat().st_size
        if length == self._uploaded:
            return
        begun = time.monotonic()
        self._store.write_file(self._path, self._source)
        self._took = time.monotonic() - begun
        self._uploaded = length
