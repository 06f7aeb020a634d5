"""A real server in its own process, as people start it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil


class LiveServer:
    """`srdeploy serve ARGUMENTS` on a free port, with its log as a list of events."""

    def __init__(self, folder: Path, *arguments: object, wait: bool = True, **env: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log_file = folder / "server.log"
        command = [sys.executable, "-m", "srdeploy", "serve", *map(str, arguments)]
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--port", "0", "--log", "json"],
                stderr=log,
                stdout=subprocess.DEVNULL,
                env={**os.environ, **env},
            )
        self.url = self._wait_for("listening")["address"]
        if wait:
            self._wait_for("ready")

    @property
    def events(self) -> list[dict[str, Any]]:
        """The log so far, without incomplete lines and without what libtiff itself writes about
        damaged files."""
        whole = self.log_file.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines() if line.startswith("{")]

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, timeout=60, **options)

    def metric(self, pattern: str) -> float:
        """The sum of the metrics whose line starts with a match of `pattern`."""
        lines = self.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(pattern, line))

    def wait_for(self, message: str, count: int = 1) -> list[dict[str, Any]]:
        """The events with that message, once there are `count` of them."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            found = [event for event in self.events if event["message"] == message]
            if len(found) >= count:
                return found
            time.sleep(0.02)
        raise AssertionError(f"no '{message}' in {self.log_file.read_text()}")

    def _wait_for(self, message: str) -> dict[str, Any]:
        deadline = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < deadline:
            for event in self.events:
                if event["message"] == message:
                    return event
            time.sleep(0.02)
        raise AssertionError(f"the server did not start: {self.log_file.read_text()}")

    def terminate(self) -> int:
        """Sends SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def workers(self) -> list[psutil.Process]:
        """Its worker processes, without Python's own helpers."""
        if self.process.poll() is not None:
            return []
        children = psutil.Process(self.process.pid).children()
        return [one for one in children if "spawn_main" in " ".join(one.cmdline())]

    def kill(self) -> None:
        """Ends the server and its workers, in any state."""
        workers = self.workers()
        self.process.kill()
        self.process.wait(60)
        for worker in workers:
            worker.kill()
