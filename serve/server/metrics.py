"""One model's statistics, in Triton's form."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from srdeploy.serve.scheduling.jobs import STEPS, Job
from srdeploy.serve.server.registry import ModelCard

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


# What operators see: Prometheus's metrics, of one process or of all workers together.

_SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.02,
    0.035,
    0.05,
    0.075,
    0.1,
    0.15,
    0.25,
    0.5,
    1,
    2.5,
    5,
    10,
)
_IMAGES = (1, 2, 4, 8, 16, 32)
WORKERS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""The environment's name of the folder in which workers leave their figures."""


class Watch:
    """The metrics of one server."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        own = CollectorRegistry()
        self._registry = own
        self._tallies: dict[str, Tally] = {}
        self.requests = Counter(
            "srdeploy_requests", "Answered requests.", ("model", "route", "status"), registry=own
        )
        self.refused = Counter(
            "srdeploy_refused", "Requests that were not served.", ("reason",), registry=own
        )
        self.waiting = Gauge(
            "srdeploy_waiting_requests",
            "Requests taken in and not yet answered.",
            registry=own,
            multiprocess_mode="livesum",
        )
        self.queued = Gauge(
            "srdeploy_queue_images",
            "Images that wait to be decoded or run.",
            ("model",),
            registry=own,
            multiprocess_mode="livesum",
        )
        self.ready = Gauge(
            "srdeploy_ready",
            "1 when all models are loaded and warmed up.",
            registry=own,
            multiprocess_mode="livemin",
        )
        self._batch = Histogram(
            "srdeploy_batch_images", "Images in one run.", ("model",), buckets=_IMAGES, registry=own
        )
        self._steps = Histogram(
            "srdeploy_step_seconds",
            "Time of each step of an image: decode, wait, compute, encode.",
            ("model", "step"),
            buckets=_SECONDS,
            registry=own,
        )
        self.duration = Histogram(
            "srdeploy_request_seconds",
            "From a request's first byte to its answer.",
            ("model", "route"),
            buckets=_SECONDS,
            registry=own,
        )

    def tally(self, model: str) -> Tally:
        """The model's statistics, of this process."""
        return self._tallies.setdefault(model, Tally())

    def observe(self, model: str, jobs: Sequence[Job]) -> None:
        """Counts the steps of an answered request's jobs."""
        self.tally(model).count(jobs)
        for job in jobs:
            timing = job.timing
            self._batch.labels(model).observe(timing.batch)
            for step in STEPS:
                self._steps.labels(model, step).observe(getattr(timing, step) / 1000)

    def leave(self) -> None:
        """A worker ends: what it said of the present counts no longer."""
        if WORKERS_FOLDER in os.environ:
            mark_process_dead(os.getpid())  # type: ignore[no-untyped-call]

    def text(self) -> bytes:
        """In Prometheus's text form; of all workers, where there are several."""
        if WORKERS_FOLDER not in os.environ:
            return generate_latest(self._registry)
        together = CollectorRegistry()
        MultiProcessCollector(together)  # type: ignore[no-untyped-call]
        return generate_latest(together)
