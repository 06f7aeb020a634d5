"""Benchmarks made of `srdeploy` commands: their words, their JSON, and how long each took."""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class Journal:
    """Runs `srdeploy` commands and keeps their words, their JSON and the time each took."""

    def __init__(self) -> None:
        self.commands: list[dict[str, Any]] = []

    def run(self, *words: str | Path) -> dict[str, Any]:
        """The command's JSON. Progress goes to stderr; a failure ends the benchmark."""
        arguments = [str(word) for word in words]
        print("$ srdeploy " + shlex.join(arguments), file=sys.stderr)
        began = time.perf_counter()
        result = subprocess.run(
            [sys.executable, "-m", "srdeploy", *arguments, "--json"],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        seconds = round(time.perf_counter() - began, 1)
        command = shlex.join(["srdeploy", *arguments])
        self.commands.append({"command": command, "seconds": seconds})
        if result.returncode not in (0, 1) or not result.stdout:
            raise SystemExit(result.returncode)
        answer: dict[str, Any] = json.loads(result.stdout)
        return answer


def without_runs(report: dict[str, Any]) -> dict[str, Any]:
    """A benchmark's JSON but for the time of every run, and for paths, some of them temporary: what
    a figure rests on, in few lines."""
    for cell in report["cells"]:
        for row in cell["rows"]:
            del row["path"]
            for timing in (row["end_to_end"], row["device_time"]):
                if timing is not None:
                    del timing["rounds_ms"]
    return report
