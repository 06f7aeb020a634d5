"""The raw runtime (plain_runtime.py as a program), measured on demand."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from asked_process import AskedProcess

Rates = dict[str, float]
"""Images per second of each way to run it."""


class RawRuntime:
    """A process with open sessions and decoded photos, which is at rest until it is asked."""

    def __init__(self, graph: Path, photos: list[Path], engine: list[str]) -> None:
        words = [str(graph), *map(str, photos), *engine]
        self._process = AskedProcess("the raw runtime", "plain_runtime.py", *words)

    def __enter__(self) -> Self:
        self._process.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.__exit__(kind, error, traceback)

    def measure(self, seconds: float) -> Rates:
        """Of `seconds` each, over the photos again and again."""
        found: Rates = self._process.ask(str(seconds))
        return found

    def measure_pass(self) -> Rates:
        """Of one pass each over all photos."""
        found: Rates = self._process.ask("pass")
        return found


def raw_summary(measured: Sequence[Rates]) -> dict[str, Any]:
    """Images per second of each way to run the raw runtime, over the whole run, and the better."""
    mean = {kind: float(np.mean([one[kind] for one in measured])) for kind in measured[0]}
    deviation = {kind: float(np.std([one[kind] for one in measured])) for kind in measured[0]}
    return {
        "images_per_s": mean,
        "deviation": deviation,
        "best": max(mean, key=lambda kind: mean[kind]),
    }


def raw_text(raw: dict[str, Any]) -> str:
    """A summary as a sentence."""
    told = "; ".join(
        f"{kind} {rate:.1f} +- {raw['deviation'][kind]:.1f}"
        for kind, rate in raw["images_per_s"].items()
    )
    return f"Raw runtime, images/s: {told}; fractions are of {raw['best']}."
