"""Ctrl-C and SIGTERM, as a request that a long job honours between two of its steps."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

from srdeploy import console


class StopRequest:
    """While it is open, the first SIGINT or SIGTERM sets `requested`; a second one acts as usual.

    Only the main thread can catch signals: in any other one this does nothing.
    """

    def __init__(self, message: str) -> None:
        """message: what is said when it is asked to stop."""
        self.requested = False
        self._message = message
        self._before: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()
        console.say(self._message)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
