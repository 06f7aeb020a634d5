"""`srdeploy predict` over a folder of photos, beside the raw runtime and what people write instead.

    python benchmarks/folders.py deploy/night --photos camvid/images/test --out folders.json
    python benchmarks/folders.py deploy/night --photos camvid/images/test --runtime openvino \
        --precision bf16 --contenders srdeploy,side-by-side

JPEGs are read, PNG masks are written. Each contender (folder_ours.py, folder_peers.py) is a process
that has gone through the folder once and stands still (SIGSTOP) until its turn: one pass over all
photos into a fresh folder. Rounds go through the contenders forth and back. Before and after each
turn the raw runtime goes through the same photos, decoded before; the fraction is images per second
over the better of its two ways (a 1-thread session for each core, one session with all cores).
Beside it stands the ceiling that the codec's core time leaves, also with perfect overlap: with n
core-seconds a photo for the network (cores / raw rate) and c for the codec (one thread, alone),
n / (n + c). After each turn every mask is compared with `evaluate`'s.
"""

import shlex
import shutil
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from asked_process import AskedProcess
from codec_cost import CodecCost, Cost, ceiling
from folder_masks import ExpectedMasks
from folder_peers import KINDS as PEERS
from folder_peers import LOADERS
from intervals import interval, interval_text
from plain_runtime import spec_of
from raw_rates import RawRuntime, raw_summary, raw_text
from server_process import harmless

from srdeploy import console
from srdeploy.artifacts.artifact import open_artifact
from srdeploy.environment import PACKAGES, describe_environment, usable_cores
from srdeploy.files import sha256_of, write_json

OURS = "srdeploy"
OURS_ANEW = "srdeploy-anew"
"""Each turn opens the network again, before its time counts: runtimes leave some work to the first
run, OpenVINO to the first of each size."""
CONTENDERS = (OURS, OURS_ANEW, *PEERS)
TOLD = (*PACKAGES, "openvino", "simplejpeg")


def main(
    artifact: Annotated[Path, typer.Argument(help="A deploy folder or an .onnx file of ours.")],
    photos: Annotated[Path, typer.Option(help="Folder of JPEGs, of any sizes.")],
    contenders: Annotated[str, typer.Option(help="Which, with commas.")] = ",".join(CONTENDERS),
    runtime: Annotated[str, typer.Option(help="onnxruntime or openvino.")] = "onnxruntime",
    precision: Annotated[str, typer.Option(help="Of OpenVINO: fp32, bf16, fp16.")] = "fp32",
    rounds: Annotated[int, typer.Option(help="Each gives every contender a turn.", min=2)] = 6,
    count: Annotated[int, typer.Option(help="Photos, the first of the folder.", min=1)] = 100,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("folders.json"),
) -> None:
    """Give each contender its turns, and compare."""
    chosen = choose(contenders)
    found = sorted(photos.glob("*.jpg"))[:count]
    if not found:
        raise SystemExit(f"no *.jpg in {photos}: nothing was measured")
    if not artifact.exists():
        raise SystemExit(f"no such artifact: {artifact}: nothing was measured")
    graph = open_artifact(artifact).file
    openvino_precision = precision if runtime == "openvino" else None
    engine = ["--runtime", runtime]
    engine += ["--precision", precision] if openvino_precision else []
    cells: list[dict[str, Any]] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "photos").mkdir()
        files = [Path(shutil.copy(one, folder / "photos")) for one in found]
        console.say("the masks to expect")
        expected = ExpectedMasks(graph, files, runtime, openvino_precision)
        codec = CodecCost(graph, spec_of(graph), files, expected.ours, folder / "codec")
        started = {}
        for name in chosen:
            console.say(f"start {name}")
            one = stack.enter_context(contender(name, graph, folder / "photos", engine))
            turn(one, folder / "out", len(files), expected)
            started[name] = one
        raw_runtime = stack.enter_context(RawRuntime(graph, files, engine))
        codec_costs = []
        raw_rates = [raw_runtime.measure_pass()]
        order = list(chosen)
        for number in range(rounds):
            codec_costs.append(codec.measure())
            for name in order:
                console.say(f"round {number + 1}/{rounds}: {name}")
                cell = turn(started[name], folder / "out", len(files), expected)
                raw_rates.append(raw_runtime.measure_pass())
                before, after = raw_rates[-2:]
                cells.append(cell | {"round": number, "raw_before": before, "raw_after": after})
            order.reverse()
        commands = {name: one.command for name, one in started.items()}
    raw = raw_summary(raw_rates)
    codec_ms = {kind: interval([one[kind] for one in codec_costs]) for kind in codec_costs[0]}
    best = ceiling(raw["images_per_s"][raw["best"]], usable_cores(), codec_ms["ours"][0])
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": harmless(shlex.join(["python", "folders.py", *sys.argv[1:]])),
        "environment": describe_environment(TOLD),
        "artifact_sha256": sha256_of(graph),
        "photos": len(files),
        "runtime": runtime,
        "precision": openvino_precision,
        "rounds": rounds,
        "loader_processes": LOADERS,
        "contenders": commands,
        "raw": raw,
        "codec_ms": codec_ms,
        "ceiling": best,
        "photos_decoded_otherwise_by_pillow": sum(
            one is not other for one, other in zip(expected.ours, expected.peers, strict=True)
        ),
        "rows": rows(cells, codec_costs, chosen, raw["best"]),
        "cells": cells,
    }
    write_json(out, report)
    print(table(report))


def choose(contenders: str) -> list[str]:
    """The contenders to measure."""
    chosen = [one.strip() for one in contenders.split(",") if one.strip()]
    unknown = [one for one in chosen if one not in CONTENDERS]
    if unknown or not chosen:
        raise SystemExit(
            f"unknown contenders {unknown}: {', '.join(CONTENDERS)}: nothing was measured"
        )
    return list(dict.fromkeys(chosen))


def contender(name: str, graph: Path, photos: Path, engine: list[str]) -> AskedProcess:
    """One of the processes, not yet started."""
    words = [str(graph), str(photos), *engine]
    if name in (OURS, OURS_ANEW):
        return AskedProcess(name, "folder_ours.py", *words, *["--anew"] * (name == OURS_ANEW))
    return AskedProcess(name, "folder_peers.py", name, *words)


def turn(one: AskedProcess, out: Path, count: int, expected: ExpectedMasks) -> dict[str, Any]:
    """A pass over all `count` photos; its masks are judged and removed. Ends the benchmark where
    photos were left out."""
    told: dict[str, Any] = one.ask(str(out))
    if told["images"] != count:
        raise SystemExit(f"{one.name} did {told['images']} of {count} photos: nothing was measured")
    wanted = expected.peers if one.name in PEERS else expected.ours
    masks = expected.judge(out, wanted)
    shutil.rmtree(out)
    rate = told["images"] / told["seconds"]
    return {"contender": one.name, **told, "images_per_s": rate, "masks": dict(masks)}


def rows(
    cells: list[dict[str, Any]], costs: list[Cost], chosen: list[str], best: str
) -> list[dict[str, Any]]:
    """One row for each contender, over all rounds. best: the raw way that fractions are of."""
    rates: dict[str, Any] = {}
    found: list[dict[str, Any]] = []
    for name in chosen:
        mine = [one for one in cells if one["contender"] == name]  # in the order of the rounds
        rates[name] = np.array([one["images_per_s"] for one in mine])
        raw = np.array([(one["raw_before"][best] + one["raw_after"][best]) / 2 for one in mine])
        kind = "pillow" if name in PEERS else "ours"
        most = [
            ceiling(rate, usable_cores(), cost[kind]) for rate, cost in zip(raw, costs, strict=True)
        ]
        masks: Counter[str] = Counter()
        for one in mine:
            masks.update(one["masks"])
        found.append(
            {
                "contender": name,
                "images_per_s": interval(rates[name]),
                "fraction": interval(rates[name] / raw),
                "ceiling": interval(most),
                "of_ceiling": interval(rates[name] / raw / np.array(most)),
                "masks": dict(masks),
            }
        )
    for name, row in zip(chosen, found, strict=True):
        own = OURS in rates and name != OURS
        row["srdeploy_over_it"] = interval(rates[OURS] / rates[name]) if own else None
    return found


def table(report: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "| contender | images/s (95 %) | fraction of raw (95 %) | its codec's ceiling | "
        "of that ceiling (95 %) | srdeploy over it (95 %) | masks same | rounded | "
        "wrong, missing |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        masks = row["masks"]
        cells = [row["contender"], interval_text(row["images_per_s"], 1)]
        cells += [interval_text(row["fraction"], 3), f"{row['ceiling'][0]:.3f}"]
        cells += [interval_text(row["of_ceiling"], 3), interval_text(row["srdeploy_over_it"], 3)]
        cells += [str(masks["same"]), str(masks["rounded"])]
        cells += [str(masks["wrong"] + masks["missing"])]
        lines.append("| " + " | ".join(cells) + " |")
    codec = {kind: interval_text(one) for kind, one in report["codec_ms"].items()}
    lines += [
        "",
        raw_text(report["raw"]),
        f"Core time of the codec, ms a photo: ours {codec['ours']}, with checksums and counts "
        f"{codec['ours_recorded']}; Pillow's {codec['pillow']}. "
        f"Ours leaves a ceiling of {report['ceiling']:.3f}.",
        f"Photos that Pillow decodes to other pixels than `evaluate`: "
        f"{report['photos_decoded_otherwise_by_pillow']} of {report['photos']}.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
