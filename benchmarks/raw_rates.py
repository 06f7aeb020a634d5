"""The raw runtime (plain_runtime.py as a program), measured on demand."""

import json
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

from server_process import script


class RawRuntime:
    """A process with open sessions and decoded photos, which is at rest until it is asked."""

    def __init__(self, graph: Path, photos: list[Path], engine: list[str]) -> None:
        self._command = script("plain_runtime.py", str(graph), *map(str, photos), *engine)

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._line()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def measure(self, seconds: float) -> dict[str, float]:
        """Images per second of each way to run it, `seconds` each."""
        assert self._process.stdin is not None
        print(seconds, file=self._process.stdin, flush=True)
        found: dict[str, float] = json.loads(self._line())
        return found

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the raw runtime ended: nothing was measured")
        return line
