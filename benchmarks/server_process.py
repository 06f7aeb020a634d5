"""Servers under test, each in a process group of its own."""

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

BENCHMARKS = Path(__file__).resolve().parent
START_S = 120.0
"""How long a server may take until it is ready."""


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


class ServerProcess:
    """A server that runs from `with` on; in the block `wait` until it is ready. It is ended with
    all its children, also those that it leaves behind."""

    def __init__(self, name: str, words: list[str], health: str) -> None:
        """words: of the command, in which {port} becomes the port. health: the path that answers
        200 when the server is ready."""
        self.name = name
        self.port = free_port()
        self.command = [word.replace("{port}", str(self.port)) for word in words]
        self._health = health

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.resume()
        self._signal(signal.SIGTERM)
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            print(f"{self.name} did not end on SIGTERM", file=sys.stderr)
        self._signal(signal.SIGKILL)  # LitServe leaves its workers behind
        self._process.wait()
        self._log.close()

    def wait(self) -> None:
        """Until the server is ready. Ends the benchmark with its last words where it never is."""
        limit = time.perf_counter() + START_S
        while time.perf_counter() < limit and self._process.poll() is None:
            try:
                if self.get(self._health)[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.1)
        raise SystemExit(f"{self.name} did not start: nothing was measured\n{self.words()}")

    def pause(self) -> None:
        """Stops all its processes where they stand: some servers burn CPU while they idle."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Lets them go on."""
        self._signal(signal.SIGCONT)

    def get(self, path: str) -> tuple[int, str]:
        """(status, text) of an address. Raises OSError where there is no answer."""
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self.port}{path}", timeout=10
            ) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(errors="replace")

    def words(self) -> str:
        """The last of what the server wrote."""
        self._log.seek(0)
        return self._log.read()[-3000:].decode(errors="replace")

    @property
    def ended(self) -> bool:
        """Whether it has stopped by itself."""
        return self._process.poll() is not None

    def memory_mib(self) -> float:
        """Resident memory of all its processes."""
        return sum(one.memory_info().rss for one in self._tree()) / 2**20

    def cpu_s(self) -> float:
        """CPU time of all its processes so far."""
        return sum(sum(one.cpu_times()[:2]) for one in self._tree())

    def _tree(self) -> list[psutil.Process]:
        found = []
        try:
            first = psutil.Process(self._process.pid)
            for one in [first, *first.children(recursive=True)]:
                one.memory_info()
                found.append(one)
        except psutil.NoSuchProcess:
            pass
        return found

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def script(name: str, *words: str) -> list[str]:
    """The command of a script beside this one."""
    return [sys.executable, str(BENCHMARKS / name), *words]


def harmless(command: str) -> str:
    """A command without the paths of this machine."""
    words = [Path(word).name if "/" in word else word for word in shlex.split(command)]
    return shlex.join(words)


def plan_of(server: ServerProcess) -> Any:
    """How `srdeploy serve` laid out the sessions of its first model, with what it measured."""
    _, text = server.get("/v1/models")
    return json.loads(text)["models"][0]["plan"]
