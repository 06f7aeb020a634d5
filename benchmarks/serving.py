"""`srdeploy serve` under load, beside LitServe and plain FastAPI applications on the same file.

    python benchmarks/serving.py deploy/night --photos camvid/images/test --out serving.json
    python benchmarks/serving.py deploy/night --photos camvid/images/test --runtime openvino \
        --precision bf16 --servers srdeploy,fastapi-2x1
    python benchmarks/serving.py deploy/night --photos camvid/images/test --protocol tensor

A JPEG goes in and a PNG mask comes out, for 1, 8 and 32 clients that each wait for their answer.
All servers run from the start, and all but the one under load stand still (SIGSTOP), for some burn
CPU while they idle. Rounds go through the servers forth and back. Before and after each load the
raw runtime is measured on decoded photos; the fraction is images per second over the better of its
two ways (a 1-thread session for each core, one session with all cores). Every reply is compared
with the mask that the runtime gives by itself.
"""

import gc
import shlex
import sys
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import uvloop
from answers import MODEL, Photos, Verdict
from intervals import interval, interval_text
from load import Outcome, closed_loop
from raw_rates import RawRuntime, raw_summary, raw_text
from server_process import ServerProcess, harmless, plan_of, script

from srdeploy import console
from srdeploy.artifacts.artifact import open_artifact
from srdeploy.environment import PACKAGES, describe_environment
from srdeploy.files import sha256_of, write_json

OURS = "srdeploy"
PEERS = {
    "litserve": ("litserve_peer.py", "--batch", "1"),
    "litserve-batch8": ("litserve_peer.py", "--batch", "8", "--wait-ms", "5"),
    "fastapi-1x2": ("serving_peers.py", "--sessions", "1", "--threads", "2", "--pool", "0"),
    "fastapi-2x1": ("serving_peers.py", "--sessions", "2", "--threads", "1", "--pool", "4"),
}
"""Script and options of each. 1x2: one session of two threads, FastAPI's own threads for requests;
2x1: two sessions of one thread, four threads for requests."""
SERVERS = (OURS, *PEERS)
TOLD = (*PACKAGES, "openvino", "fastapi", "uvicorn", "uvloop", "httptools", "litserve")


def main(
    artifact: Annotated[Path, typer.Argument(help="A deploy folder or an .onnx file of ours.")],
    photos: Annotated[Path, typer.Option(help="Folder of JPEGs of one size.")],
    servers: Annotated[str, typer.Option(help="Which, with commas.")] = ",".join(SERVERS),
    protocol: Annotated[str, typer.Option(help="image, or tensor: ours alone.")] = "image",
    runtime: Annotated[str, typer.Option(help="onnxruntime or openvino.")] = "onnxruntime",
    precision: Annotated[str, typer.Option(help="Of OpenVINO: fp32, bf16, fp16.")] = "fp32",
    option: Annotated[
        list[str] | None, typer.Option(help="A word for srdeploy serve, e.g. --set=sessions=2.")
    ] = None,
    concurrency: Annotated[str, typer.Option(help="Numbers of clients.")] = "1,8,32",
    rounds: Annotated[int, typer.Option(help="Each loads every server once.", min=2)] = 4,
    seconds: Annotated[float, typer.Option(help="Of each load.")] = 5.0,
    warm: Annotated[float, typer.Option(help="Seconds of load before it counts.")] = 2.0,
    raw: Annotated[float, typer.Option(help="Seconds of each raw measurement.")] = 1.5,
    count: Annotated[int, typer.Option(help="Photos that are sent in turn.", min=1)] = 32,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("serving.json"),
) -> None:
    """Load every server in turn, and compare."""
    files = sorted(photos.glob("*.jpg"))[:count]
    if not files:
        raise SystemExit(f"no *.jpg in {photos}: nothing was measured")
    if not artifact.exists():
        raise SystemExit(f"no such artifact: {artifact}: nothing was measured")
    chosen = choose(servers, protocol)
    openvino_precision = precision if runtime == "openvino" else None
    prepared = Photos(artifact, files, runtime, openvino_precision)
    graph = open_artifact(artifact).file
    engine = ["--runtime", runtime]
    engine += ["--precision", precision] if openvino_precision else []
    clients = [int(one) for one in concurrency.split(",")]
    cells: list[dict[str, Any]] = []
    judged: dict[tuple[str, int], Verdict] = {}
    with ExitStack() as stack:
        started = {}
        plan = None
        # One after the other: ours measures at its start how to lay out its sessions.
        for name in chosen:
            console.say(f"start {name}")
            one = stack.enter_context(server(name, artifact, graph, engine, option or []))
            one.wait()
            if name == OURS:
                plan = plan_of(one)
            one.pause()
            started[name] = one
        raw_runtime = stack.enter_context(RawRuntime(graph, files, engine))
        raw_rates = [raw_runtime.measure(raw)]
        order = list(chosen)
        for number in range(rounds):
            for many in clients if number % 2 == 0 else reversed(clients):
                for name in order:
                    console.say(f"round {number + 1}/{rounds}: {name}, {many} clients")
                    outcome, cell = load(started, name, prepared, protocol, many, warm, seconds)
                    raw_rates.append(raw_runtime.measure(raw))
                    before, after = raw_rates[-2:]
                    cell |= {"round": number, "raw_before": before, "raw_after": after}
                    cells.append(cell)
                    verdict = prepared.judge(outcome.replies)
                    judged[name, many] = added(judged.get((name, many)), verdict)
            order.reverse()
        commands = {name: shlex.join(one.command) for name, one in started.items()}
        memory = {name: round(one.memory_mib(), 1) for name, one in started.items()}
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": harmless(shlex.join(["python", "serving.py", *sys.argv[1:]])),
        "environment": describe_environment(TOLD),
        "artifact_sha256": sha256_of(graph),
        "photos": len(files),
        "size": list(prepared.size),
        "protocol": protocol,
        "runtime": runtime,
        "precision": openvino_precision,
        "seconds": seconds,
        "warm_s": warm,
        "rounds": rounds,
        "servers": {name: harmless(command) for name, command in commands.items()},
        "memory_mib": memory,
        "plan": plan,
        "raw": raw_summary(raw_rates),
        "rows": rows(cells, judged, chosen, clients, raw_summary(raw_rates)["best"]),
        "cells": [{key: one for key, one in cell.items() if key != "times"} for cell in cells],
    }
    write_json(out, report)
    print(table(report))


def choose(servers: str, protocol: str) -> list[str]:
    """The servers to measure. Says loudly which are left out and why."""
    chosen = [one.strip() for one in servers.split(",") if one.strip()]
    unknown = [one for one in chosen if one not in SERVERS]
    if unknown or not chosen:
        raise SystemExit(f"unknown servers {unknown}: {', '.join(SERVERS)}: nothing was measured")
    if protocol not in ("image", "tensor"):
        raise SystemExit(f"unknown protocol '{protocol}': image or tensor: nothing was measured")
    if protocol == "tensor":
        console.say("The peers take images alone: tensors are measured with srdeploy only")
        return [OURS]
    if find_spec("litserve") is None:
        missing = [one for one in chosen if one.startswith("litserve")]
        if missing:
            console.say(
                f"NOT MEASURED: {', '.join(missing)}, for litserve is not installed: "
                "pip install litserve==0.2.19"
            )
        chosen = [one for one in chosen if one not in missing]
    if not chosen:
        raise SystemExit("no server is left: nothing was measured")
    return chosen


def server(
    name: str, artifact: Path, graph: Path, engine: list[str], options: list[str]
) -> ServerProcess:
    """One of the servers, not yet started."""
    if name == OURS:
        words = [sys.executable, "-m", "srdeploy", "serve", f"{MODEL}={artifact}"]
        words += ["--port", "{port}", *engine, *options]
        return ServerProcess(name, words, "/v2/health/ready")
    file, *words = PEERS[name]
    return ServerProcess(
        name, script(file, str(graph), "--port", "{port}", *engine, *words), "/health"
    )


def load(
    started: dict[str, ServerProcess],
    name: str,
    photos: Photos,
    protocol: str,
    clients: int,
    warm: float,
    seconds: float,
) -> tuple[Outcome, dict[str, Any]]:
    """Loads one server while the others stand still."""
    port = started[name].port
    calls = photos.tensor_calls(port) if protocol == "tensor" else photos.image_calls(port)
    cpu_before = started[name].cpu_s()
    gc.collect()
    gc.disable()  # a collection would look like the server's pause
    started[name].resume()
    outcome = uvloop.run(closed_loop(port, calls, clients, warm, seconds))
    started[name].pause()
    gc.enable()
    cpu = started[name].cpu_s() - cpu_before
    if started[name].ended:
        raise SystemExit(f"{name} ended under load\n{started[name].words()}")
    times = outcome.latencies_s.get(200, [])
    return outcome, {
        "server": name,
        "clients": clients,
        "requests_per_s": outcome.rate,
        "replies": outcome.answered,
        "times": times,
        "p50_ms": percentile(times, 50),
        "p99_ms": percentile(times, 99),
        "connection_errors": outcome.connection_errors + outcome.unanswered,
        "client_cores": outcome.client_cores,
        "server_cores": cpu / (warm + seconds),
    }


def added(first: Verdict | None, second: Verdict) -> Verdict:
    """Both verdicts together."""
    if first is None:
        return second
    return Verdict(
        first.same_bytes + second.same_bytes,
        first.same_labels + second.same_labels,
        first.rounded + second.rounded,
        first.wrong + second.wrong,
        first.refused + second.refused,
        first.without_retry_after + second.without_retry_after,
    )


def rows(
    cells: list[dict[str, Any]],
    judged: dict[tuple[str, int], Verdict],
    chosen: list[str],
    clients: list[int],
    best: str,
) -> list[dict[str, Any]]:
    """One row for each server and number of clients, over all rounds. best: the raw way
    that fractions are of."""
    found = []
    for many in clients:
        rates = {}
        for name in chosen:
            mine = [one for one in cells if (one["server"], one["clients"]) == (name, many)]
            mine.sort(key=lambda one: one["round"])
            rates[name] = np.array([one["requests_per_s"] for one in mine])
            around = [(one["raw_before"][best] + one["raw_after"][best]) / 2 for one in mine]
            times = [time for one in mine for time in one["times"]]
            found.append(
                {
                    "server": name,
                    "clients": many,
                    "requests_per_s": float(rates[name].mean()),
                    "p50_ms": percentile(times, 50),
                    "p99_ms": percentile(times, 99),
                    "fraction": interval(rates[name] / np.array(around)),
                    "replies": len(times),
                    "connection_errors": sum(one["connection_errors"] for one in mine),
                    "client_cores": float(np.mean([one["client_cores"] for one in mine])),
                    **judged[name, many].as_json(),
                }
            )
        for row in found[-len(chosen) :]:
            ratio = None
            if OURS in rates and row["server"] != OURS and rates[row["server"]].min() > 0:
                ratio = interval(rates[OURS] / rates[row["server"]])
            row["srdeploy_over_it"] = ratio
    return found


def percentile(times: list[float], which: float) -> float | None:
    """In milliseconds; None of no times at all."""
    return 1000 * float(np.percentile(times, which)) if times else None


def table(report: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "| clients | server | requests/s | p50, ms | p99, ms | fraction of raw (95 %) | "
        "srdeploy over it (95 %) | replies | errors | wrong | rounded |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        errors = row["connection_errors"] + sum(row["other_statuses"].values())
        cells = [str(row["clients"]), row["server"], f"{row['requests_per_s']:.1f}"]
        cells += [_milliseconds(row["p50_ms"]), _milliseconds(row["p99_ms"])]
        cells += [interval_text(row["fraction"]), interval_text(row["srdeploy_over_it"])]
        cells += [str(row["replies"]), str(errors), str(row["wrong"]), str(row["rounded"])]
        lines.append("| " + " | ".join(cells) + " |")
    loads = [cell["client_cores"] for cell in report["cells"]]
    lines += [
        "",
        raw_text(report["raw"]),
        f"The load itself took {max(loads):.3f} cores at most.",
    ]
    return "\n".join(lines)


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


if __name__ == "__main__":
    typer.run(main)
