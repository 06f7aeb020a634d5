"""How far a long job is: a bar on terminals, a line now and then elsewhere."""

import time
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from srdeploy import console
from srdeploy.serve.folders.summary import Tally

LINE_EVERY_S = 60.0
"""Where stderr is no terminal."""


class Meter:
    """Shows photos done, images/s and the time left, on stderr. A context manager."""

    def __init__(self, total: int, tally: Tally) -> None:
        self._total = total
        self._tally = tally
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

    def move(self) -> None:
        """After each photo that was tallied."""
        tally = self._tally
        rate = f"{tally.images_per_s:.1f} images/s"
        self._bar.update(self._task, completed=tally.handled, rate=rate)
        if self._bar.disable and time.monotonic() - self._last_line > LINE_EVERY_S:
            self._last_line = time.monotonic()
            done = tally.images + tally.skipped_count
            left_s = (self._total - tally.handled) * tally.seconds / done
            console.say(
                f"{tally.handled:,} of {self._total:,} photos, {rate}, about "
                f"{_duration(left_s)} left"
            )


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
