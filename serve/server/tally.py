"""One model's statistics, in Triton's form."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from srdeploy.serve.scheduling.job import Job
from srdeploy.serve.server.card import ModelCard

_STEPS = {
    "queue": "wait",
    "compute_input": "decode",
    "compute_infer": "compute",
    "compute_output": "encode",
}
"""Our steps, by Triton's names."""


@dataclass(eq=False)
class Tally:
    """Counts since the start. Used on the event loop's thread alone."""

    requests: int = 0
    failures: int = 0
    """Requests that reached the model's queue and were not answered."""
    images: int = 0
    runs: float = 0.0
    milliseconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_STEPS, 0.0))
    last: float = 0.0
    """Time of the last answer, in seconds since 1970."""

    def count(self, jobs: Sequence[Job]) -> None:
        """One answered request."""
        self.requests += 1
        self.last = time.time()
        for job in jobs:
            self.images += 1
            self.runs += 1 / max(job.timing.batch, 1)
            for theirs, ours in _STEPS.items():
                self.milliseconds[theirs] += getattr(job.timing, ours)

    def in_tritons_form(self, card: ModelCard) -> dict[str, Any]:
        """One entry of model_stats."""
        steps = {
            name: {"count": self.requests, "ns": int(1e6 * total)}
            for name, total in self.milliseconds.items()
        }
        total = {"count": self.requests, "ns": sum(step["ns"] for step in steps.values())}
        return {
            "name": card.name,
            "version": card.version,
            "last_inference": int(1000 * self.last),
            "inference_count": self.images,
            "execution_count": round(self.runs),
            "inference_stats": {
                "success": total,
                "fail": {"count": self.failures, "ns": 0},
                **steps,
            },
            "batch_stats": [],
        }
