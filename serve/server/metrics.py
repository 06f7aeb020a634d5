"""Statistics of each model, as Triton reports them, and the server's Prometheus metrics."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from srdeploy.serve.scheduling.scheduler import STEPS, WorkItem
from srdeploy.serve.server.registry import ModelMetadata

_STEPS = {
    "queue": "wait",
    "compute_input": "decode",
    "compute_infer": "compute",
    "compute_output": "encode",
}
"""Triton's name of each step -> ours."""

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
"""Environment variable with the folder in which worker processes keep their metrics."""


@dataclass(eq=False)
class ModelStats:
    """One model's counts since the start. Used only on the event loop's thread."""

    requests: int = 0
    failures: int = 0
    """Number of requests that reached the model's queue and were not answered."""
    images: int = 0
    runs: float = 0.0
    milliseconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_STEPS, 0.0))
    last: float = 0.0
    """Time of the last answer, in seconds since 1970."""

    def count(self, items: Sequence[WorkItem]) -> None:
        """Counts one answered request."""
        self.requests += 1
        self.last = time.time()
        for item in items:
            self.images += 1
            self.runs += 1 / max(item.timing.batch, 1)
            for theirs, ours in _STEPS.items():
                self.milliseconds[theirs] += getattr(item.timing, ours)

    def as_triton(self, metadata: ModelMetadata) -> dict[str, Any]:
        """One entry of model_stats in Triton's statistics extension."""
        steps = {
            name: {"count": self.requests, "ns": int(1e6 * total)}
            for name, total in self.milliseconds.items()
        }
        total = {"count": self.requests, "ns": sum(step["ns"] for step in steps.values())}
        return {
            "name": metadata.name,
            "version": metadata.version,
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


class ServerMetrics:
    """The Prometheus metrics of one process, or of all worker processes together."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self._registry = registry
        self._stats: dict[str, ModelStats] = {}
        self.requests = Counter(
            "srdeploy_requests",
            "Answered requests.",
            ("model", "route", "status"),
            registry=registry,
        )
        self.refused = Counter(
            "srdeploy_refused",
            "Requests that were not served.",
            ("reason",),
            registry=registry,
        )
        self.waiting = Gauge(
            "srdeploy_waiting_requests",
            "Requests in flight.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.queued = Gauge(
            "srdeploy_queue_images",
            "Images that wait to be decoded or run.",
            ("model",),
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.ready = Gauge(
            "srdeploy_ready",
            "1 when all models are loaded and warmed up.",
            registry=registry,
            multiprocess_mode="livemin",
        )
        self._batch = Histogram(
            "srdeploy_batch_images",
            "Images in one run.",
            ("model",),
            buckets=_IMAGES,
            registry=registry,
        )
        self._steps = Histogram(
            "srdeploy_step_seconds",
            "Time of each step of an image: decode, wait, compute, encode.",
            ("model", "step"),
            buckets=_SECONDS,
            registry=registry,
        )
        self.duration = Histogram(
            "srdeploy_request_seconds",
            "From a request's first byte to its answer.",
            ("model", "route"),
            buckets=_SECONDS,
            registry=registry,
        )

    def stats(self, model: str) -> ModelStats:
        """The model's statistics in this process."""
        return self._stats.setdefault(model, ModelStats())

    def observe(self, model: str, items: Sequence[WorkItem]) -> None:
        """Counts the steps of an answered request's items."""
        self.stats(model).count(items)
        for item in items:
            timing = item.timing
            self._batch.labels(model).observe(timing.batch)
            for step in STEPS:
                self._steps.labels(model, step).observe(getattr(timing, step) / 1000)

    def mark_ended(self) -> None:
        """Drops the gauges of a worker process that ends."""
        if WORKERS_FOLDER in os.environ:
            mark_process_dead(os.getpid())  # type: ignore[no-untyped-call]

    def text(self) -> bytes:
        """All metrics in Prometheus's text format; of all worker processes if there are several."""
        if WORKERS_FOLDER not in os.environ:
            return generate_latest(self._registry)
        combined = CollectorRegistry()
        MultiProcessCollector(combined)  # type: ignore[no-untyped-call]
        return generate_latest(combined)
