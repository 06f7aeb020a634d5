"""A script of ours that is loaded once, and then asked for one measurement after the other."""

import contextlib
import json
import shlex
import signal
import subprocess
from types import TracebackType
from typing import Any, Self

from server_process import harmless, script


class AskedProcess:
    """A process that says a line when it is ready, and answers each line on stdin with a line of
    JSON. It stands still (SIGSTOP) but for its answers: some runtimes' threads burn CPU between
    them."""

    def __init__(self, name: str, file: str, *words: str) -> None:
        """file: the script, of those beside this one."""
        self.name = name
        self._command = script(file, *words)

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            self._line()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    @property
    def command(self) -> str:
        """The command as it was started, without the paths of this machine."""
        return harmless(shlex.join(self._command))

    def ask(self, line: str) -> Any:
        """The answer to one line. Ends the benchmark where the process has ended."""
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):  # it has ended: there is no answer, either
            print(line, file=self._process.stdin, flush=True)
        return json.loads(self._line())

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended: nothing was measured")
        self._process.send_signal(signal.SIGSTOP)
        return line

    def _end(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.send_signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
