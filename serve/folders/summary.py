"""What a prediction did, counted while it goes on."""

import time
from dataclasses import dataclass, field

from srdeploy import console
from srdeploy.serve.folders.record import Record
from srdeploy.serve.folders.text import printable
from srdeploy.validation import Settings

MOST_LISTED = 1000
"""Skipped photos that a summary lists; the manifest has all of them."""
MOST_WARNED = 20
"""Skipped photos that are told of while the job runs."""


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
    """From the first photo to the last output."""
    images_per_s: float
    decode_s: float
    """Reading, decoding and fitting, summed over the threads."""
    run_s: float
    """In the runtime, summed over the sessions."""
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
class Tally:
    """What became of the photos so far."""

    images: int = 0
    done_before: int = 0
    skipped_count: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    decode_ms: float = 0.0
    run_ms: float = 0.0
    encode_ms: float = 0.0
    began: float | None = None
    """When the first photo was asked for; the network is loaded by then."""

    def begin(self) -> None:
        """The first photo is asked for."""
        if self.began is None:
            self.began = time.perf_counter()

    def take(self, record: Record) -> None:
        """Counts one photo, and tells of it where it was skipped."""
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
        """Since the first photo was asked for."""
        return 0.0 if self.began is None else time.perf_counter() - self.began

    @property
    def images_per_s(self) -> float:
        """Written by this run."""
        return self.images / self.seconds if self.images else 0.0
