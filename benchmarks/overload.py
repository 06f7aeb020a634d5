"""`srdeploy serve` under ten times the load that it can carry.

    python benchmarks/overload.py deploy/night --photos camvid/images/test --out overload.json
    python benchmarks/overload.py deploy/night --photos camvid/images/test --seconds 5 --times 4

The capacity is measured first, by 8 clients that each wait for their answer. Then requests leave at
ten times that rate for a minute, whether or not answers come (an open loop), while the server's
memory is recorded and its health asked for once a second. Every answer is compared with the right
one. Afterwards the queue must be empty and the capacity what it was.
"""

import asyncio
import gc
import shlex
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import uvloop
from answers import MODEL, Photos
from load import Call, Outcome, closed_loop, open_loop
from prometheus_client.parser import text_string_to_metric_families
from server_process import ServerProcess, harmless, plan_of

from srdeploy import console
from srdeploy.artifacts.artifact import open_artifact
from srdeploy.environment import PACKAGES, describe_environment
from srdeploy.files import sha256_of, write_json

CLIENTS = 8
"""Of the closed loops before and after."""
QUEUES = ("srdeploy_waiting_requests", "srdeploy_queue_images")
"""Metrics that must be 0 when all is over."""
SAMPLE_S = 0.5
TOLD = (*PACKAGES, "openvino", "fastapi", "uvicorn", "uvloop", "httptools")


@dataclass
class Watch:
    """What is seen of the server while it is overloaded."""

    memory: list[tuple[float, float]] = field(default_factory=list)
    """(seconds since the load began, MiB of all the server's processes)."""
    health_s: list[float] = field(default_factory=list)
    """How long each answer of /v2/health/live took."""
    health_failures: int = 0


def main(
    artifact: Annotated[Path, typer.Argument(help="A deploy folder or an .onnx file of ours.")],
    photos: Annotated[Path, typer.Option(help="Folder of JPEGs of one size.")],
    runtime: Annotated[str, typer.Option(help="onnxruntime or openvino.")] = "onnxruntime",
    precision: Annotated[str, typer.Option(help="Of OpenVINO: fp32, bf16, fp16.")] = "fp32",
    option: Annotated[
        list[str] | None, typer.Option(help="A word for srdeploy serve, e.g. --set=sessions=2.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Of overload.")] = 60.0,
    times: Annotated[float, typer.Option(help="The load, in capacities.")] = 10.0,
    connections: Annotated[int, typer.Option(help="At most, of the overload.")] = 256,
    capacity_seconds: Annotated[float, typer.Option(help="Of each closed loop.")] = 8.0,
    count: Annotated[int, typer.Option(help="Photos that are sent in turn.", min=1)] = 32,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("overload.json"),
) -> None:
    """Overload a server, and see whether it answers rightly, refuses at once and recovers."""
    files = sorted(photos.glob("*.jpg"))[:count]
    if not files:
        raise SystemExit(f"no *.jpg in {photos}: nothing was measured")
    if not artifact.exists():
        raise SystemExit(f"no such artifact: {artifact}: nothing was measured")
    openvino_precision = precision if runtime == "openvino" else None
    prepared = Photos(artifact, files, runtime, openvino_precision)
    words = [sys.executable, "-m", "srdeploy", "serve", f"{MODEL}={artifact}", "--port", "{port}"]
    words += ["--runtime", runtime]
    words += ["--precision", precision] if openvino_precision else []
    with ServerProcess("srdeploy", [*words, *(option or [])], "/v2/health/ready") as server:
        server.wait()
        plan = plan_of(server)
        calls = prepared.image_calls(server.port)
        console.say(f"capacity, {CLIENTS} clients")
        before = uvloop.run(closed_loop(server.port, calls, CLIENTS, 2.0, capacity_seconds))
        if not before.answered:
            raise SystemExit(f"no answers: nothing was measured\n{server.words()}")
        at_rest = server.memory_mib()
        rate = times * before.rate
        console.say(f"{rate:.0f} requests/s for {seconds:g} s")
        watch = Watch()
        gc.collect()
        gc.disable()  # a collection would look like the server's pause
        outcome = uvloop.run(overload(server, calls, rate, connections, seconds, watch))
        gc.enable()
        emptied_s = empty_after(server)
        console.say(f"capacity again, {CLIENTS} clients")
        after = uvloop.run(closed_loop(server.port, calls, CLIENTS, 2.0, capacity_seconds))
        if server.ended:
            raise SystemExit(f"the server ended under load\n{server.words()}")
        settled = server.memory_mib()
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": harmless(shlex.join(["python", "overload.py", *sys.argv[1:]])),
        "environment": describe_environment(TOLD),
        "artifact_sha256": sha256_of(open_artifact(artifact).file),
        "photos": len(files),
        "size": list(prepared.size),
        "runtime": runtime,
        "precision": openvino_precision,
        "options": option or [],
        "plan": plan,
        "seconds": seconds,
        "connections": connections,
        "capacity_per_s": {"before": before.rate, "after": after.rate},
        "wrong_before_and_after": prepared.judge(before.replies + after.replies).wrong,
        "asked_per_s": rate,
        "client": client(outcome),
        "answers": {**times_of(outcome, 200), "per_s": outcome.rate},
        "refusals": times_of(outcome, 429, 503),
        "expired": times_of(outcome, 504),
        "connection_errors": outcome.connection_errors,
        "unanswered": outcome.unanswered,
        **prepared.judge(outcome.replies).as_json(),
        "health": {**quantiles(watch.health_s), "failures": watch.health_failures},
        "queue_empty_after_s": emptied_s,
        "memory_mib": {
            "before": at_rest,
            "peak": max(mib for _, mib in watch.memory),
            "after": settled,
            "growth_per_minute": growth([one for one in watch.memory if one[0] <= seconds]),
            "samples": [[round(at, 1), round(mib, 1)] for at, mib in watch.memory],
        },
    }
    write_json(out, report)
    print(table(report))


async def overload(
    server: ServerProcess,
    calls: list[Call],
    rate: float,
    connections: int,
    seconds: float,
    watch: Watch,
) -> Outcome:
    """The load, with the server watched beside it."""
    watching = [
        asyncio.create_task(watch_memory(server, watch)),
        asyncio.create_task(watch_health(server, watch)),
    ]
    outcome = await open_loop(server.port, calls, rate, connections, seconds)
    for one in watching:
        one.cancel()
    return outcome


async def watch_memory(server: ServerProcess, watch: Watch) -> None:
    """Records the server's memory until cancelled."""
    began = time.perf_counter()
    while True:
        watch.memory.append((time.perf_counter() - began, server.memory_mib()))
        await asyncio.sleep(SAMPLE_S)


async def watch_health(server: ServerProcess, watch: Watch) -> None:
    """Asks for the server's health until cancelled, each time over a new connection."""
    while True:
        began = time.perf_counter()
        try:
            status, _ = await asyncio.to_thread(server.get, "/v2/health/live")
            watch.health_failures += status != 200
            watch.health_s.append(time.perf_counter() - began)
        except OSError:
            watch.health_failures += 1
        await asyncio.sleep(max(0.0, 1.0 - (time.perf_counter() - began)))


def empty_after(server: ServerProcess, patience: float = 30.0) -> float | None:
    """Seconds until the server's own metrics say that nothing waits; None where they don't."""
    began = time.perf_counter()
    while time.perf_counter() - began < patience:
        _, text = server.get("/metrics")
        values = [
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name in QUEUES
        ]
        if values and not any(values):
            return time.perf_counter() - began
        time.sleep(0.05)
    return None


def client(outcome: Outcome) -> dict[str, Any]:
    """Whether the load itself kept up."""
    sent = len(outcome.lags_s)
    return {
        "sent": sent,
        "sent_per_s": sent / outcome.seconds,
        "held_back": outcome.held_back,
        "cores": outcome.client_cores,
        "lag": quantiles(outcome.lags_s),
    }


def times_of(outcome: Outcome, *statuses: int) -> dict[str, Any]:
    """Count and latencies of replies with these statuses."""
    times = [one for status in statuses for one in outcome.latencies_s.get(status, [])]
    return {"count": len(times), **quantiles(times)}


def quantiles(times: list[float]) -> dict[str, float | None]:
    """p50, p99 and the largest, in milliseconds; None of no times at all."""
    if not times:
        return {"p50_ms": None, "p99_ms": None, "max_ms": None}
    p50, p99, largest = (1000 * float(one) for one in np.percentile(times, [50, 99, 100]))
    return {"p50_ms": p50, "p99_ms": p99, "max_ms": largest}


def growth(memory: list[tuple[float, float]]) -> float:
    """MiB a minute over the second half of the load: what would go on growing."""
    half = memory[len(memory) // 2 :]
    if len(half) < 2:
        return 0.0
    at, mib = zip(*half, strict=True)
    return 60 * float(np.polyfit(at, mib, 1)[0])


def table(report: dict[str, Any]) -> str:
    """The figures as Markdown."""
    capacity, memory, sender = report["capacity_per_s"], report["memory_mib"], report["client"]
    emptied = report["queue_empty_after_s"]
    refusals = report["refusals"]
    lines = [
        ("requests/s asked, sent", f"{report['asked_per_s']:.0f}, {sender['sent_per_s']:.0f}"),
        ("held back for want of a connection", str(sender["held_back"])),
        ("sent later than due, p50 / p99 / max ms", _quantiles(sender["lag"])),
        ("cores that the load took", f"{sender['cores']:.2f}"),
        ("answers", f"{report['answers']['count']} ({report['answers']['per_s']:.1f}/s)"),
        ("answers, p50 / p99 / max ms", _quantiles(report["answers"])),
        (
            "wrong, rounded answers",
            f"{report['wrong'] + report['wrong_before_and_after']}, {report['rounded']}",
        ),
        ("refusals (429, 503)", str(refusals["count"])),
        ("refusals, p50 / p99 / max ms", _quantiles(refusals)),
        ("refusals without Retry-After", str(report["without_retry_after"])),
        ("other statuses", _others(report["other_statuses"])),
        ("connection errors", str(report["connection_errors"])),
        ("requests without an answer", str(report["unanswered"])),
        ("health, p50 / p99 / max ms", _quantiles(report["health"])),
        ("health failures", str(report["health"]["failures"])),
        (
            "memory before, peak, after, MiB",
            f"{memory['before']:.0f}, {memory['peak']:.0f}, {memory['after']:.0f}",
        ),
        ("memory's growth, second half, MiB/min", f"{memory['growth_per_minute']:.1f}"),
        ("queue empty after, s", "NEVER" if emptied is None else f"{emptied:.2f}"),
        (
            f"answers/s of {CLIENTS} clients, before and after",
            f"{capacity['before']:.1f}, {capacity['after']:.1f}",
        ),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in lines)])


def _quantiles(found: dict[str, Any]) -> str:
    if found["p50_ms"] is None:
        return "none"
    return " / ".join(f"{found[key]:.1f}" for key in ("p50_ms", "p99_ms", "max_ms"))


def _others(statuses: dict[str, int]) -> str:
    others = {one: count for one, count in statuses.items() if one not in ("429", "503")}
    return ", ".join(f"{one}: {count}" for one, count in others.items()) or "none"


if __name__ == "__main__":
    typer.run(main)
