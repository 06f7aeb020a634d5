"""What a prediction did: counted, shown while it runs, and summed up at the end."""

import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from srdeploy import console
from srdeploy.serve.folders.paths import printable
from srdeploy.serve.folders.records import Record
from srdeploy.validation import Settings

MOST_LISTED = 1000
"""Skipped photos that a summary lists; the manifest has all of them."""
MOST_WARNED = 20
"""Skipped photos that are reported while the job runs."""
LINE_EVERY_S = 60.0
"""Seconds between lines of progress if stderr is no terminal."""


class Skipped(Settings):
    """A photo without outputs."""

    photo: str
    reason: str


class Summary(Settings):
    """What a prediction did. Times are in seconds; those of the steps overlap each other."""

    out: str
    engine: str
    images: int
    """Photos whose outputs were written."""
    done_before: int
    """Photos that an earlier run had done."""
    skipped_count: int
    skipped: tuple[Skipped, ...]
    """The first `MOST_LISTED` of them."""
    left: int
    """Photos that were not reached, because the job was told to stop."""
    seconds: float
    """Time from the first photo to the last output."""
    images_per_s: float
    decode_s: float
    """Reading, decoding and fitting, summed over the threads."""
    run_s: float
    """Time in the runtime, summed over the sessions."""
    encode_s: float
    """Restoring, encoding and writing, summed over the threads."""
    sessions: int
    threads: int | None
    """CPU threads of each session; None: the runtime's own choice."""
    batch: int
    """Photos in one run, at most."""

    @property
    def network_busy(self) -> float:
        """Share of the sessions' time in which they ran."""
        return self.run_s / (self.seconds * self.sessions) if self.seconds else 0.0


@dataclass
class JobStats:
    """Counts of what became of the photos so far."""

    images: int = 0
    done_before: int = 0
    skipped_count: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    decode_ms: float = 0.0
    run_ms: float = 0.0
    encode_ms: float = 0.0
    began: float | None = None
    """Time when the first photo was requested; the network is loaded by then."""

    def begin(self) -> None:
        """Starts the clock: the first photo is requested."""
        if self.began is None:
            self.began = time.perf_counter()

    def add(self, record: Record) -> None:
        """Counts one photo, and reports it if it was skipped."""
        self.decode_ms += record.times.decode
        self.run_ms += record.times.run
        self.encode_ms += record.times.encode
        if record.error is None:
            self.images += 1
            return
        self.skipped_count += 1
        if len(self.skipped) < MOST_LISTED:
            self.skipped.append(Skipped(photo=printable(record.photo.path), reason=record.error))
        if self.skipped_count <= MOST_WARNED:
            console.warn(f"skipped {printable(record.photo.path)}: {record.error}")
        elif self.skipped_count == MOST_WARNED + 1:
            console.warn("more photos are skipped: all of them, and why, are in the manifest")

    @property
    def handled(self) -> int:
        """Photos that need no more work."""
        return self.images + self.done_before + self.skipped_count

    @property
    def seconds(self) -> float:
        """Time since the first photo was requested."""
        return 0.0 if self.began is None else time.perf_counter() - self.began

    @property
    def images_per_s(self) -> float:
        """Rate of this run."""
        return self.images / self.seconds if self.images else 0.0


class ProgressReporter:
    """Shows photos done, images/s and the time left, on stderr. A context manager."""

    def __init__(self, total: int, stats: JobStats) -> None:
        self._total = total
        self._stats = stats
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._bar = stack.enter_context(console.progress("{task.fields[rate]}"))
            self._task = self._bar.add_task("predict", total=self._total, rate="")
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def advance(self) -> None:
        """Call it after each counted photo."""
        stats = self._stats
        rate = f"{stats.images_per_s:.1f} images/s"
        self._bar.update(self._task, completed=stats.handled, rate=rate)
        if self._bar.disable and time.monotonic() - self._last_line > LINE_EVERY_S:
            self._last_line = time.monotonic()
            done = stats.images + stats.skipped_count
            left_s = (self._total - stats.handled) * stats.seconds / done
            console.say(
                f"{stats.handled:,} of {self._total:,} photos, {rate}, about "
                f"{_duration(left_s)} left"
            )


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
