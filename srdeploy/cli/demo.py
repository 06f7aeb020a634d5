"""The demo: every stage of the main job on made-up data; a stage that is done is not redone."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srdeploy import console
from srdeploy.cli.demo_report import DemoFindings, demo_report, demo_verdicts
from srdeploy.cli.with_exits import export_with_exits
from srdeploy.data import open_dataset
from srdeploy.data.synth import synthesise
from srdeploy.errors import UserError
from srdeploy.export.certificate import Certificate, certify_files
from srdeploy.export.pipeline import export_run
from srdeploy.files import read_json, write_json
from srdeploy.metrics import Scores
from srdeploy.runs import METRICS, STATE, NetworkConfig
from srdeploy.serve.artifact import MODEL
from srdeploy.serve.bench.measure import LatencyReport, bench
from srdeploy.serve.evaluate import evaluate
from srdeploy.serve.predict import predict_folder
from srdeploy.serve.report import write_report
from srdeploy.serve.runtime import open_runtime
from srdeploy.train.config import TrainConfig
from srdeploy.train.loop import train
from srdeploy.train.regulation_config import RegulationConfig

KINDS = ("baseline", "regulated")
MARK = "demo.json"
NETWORK = NetworkConfig(name="unet", options={"width": 8})
"""Small enough to learn the scenes in about a minute on two cores."""
BENCH_ROUNDS = 40
MIOU_TOLERANCE = 1e-4
"""0.01 points of mIoU: what torch and the exported file may differ by."""


@dataclass(frozen=True)
class DemoOutcome:
    """How the demo ended."""

    report: Path
    passed: bool
    """Certificates passed, graphs equal, and the files as accurate as the checkpoints."""
    summary: dict[str, Any]


def run_demo(out: Path, *, steps: int, seed: int, force: bool) -> DemoOutcome:
    """Runs every stage below `out` and writes out/report.html.

    Raises UserError where `out` holds something else, or a demo with other settings.
    """
    _claim(out, {"steps": steps, "seed": seed}, force)
    data = out / "data"
    if not data.exists():
        _say_stage("data", "drawing scenes")
        synthesise(data, seed=seed)
    for kind in KINDS:
        _say_stage(kind, "training")
        _train(kind, data, out / "runs" / kind, steps, seed)
    exports = {}
    for kind in KINDS:
        _say_stage(kind, "exporting and certifying")
        result = export_run(out / "runs" / kind, out / "deploy" / kind, force=True)
        exports[kind] = result.certificate
        _say_lines(result.certificate)
    models = [out / "deploy" / kind / MODEL for kind in KINDS]
    _say_stage("both", "comparing the two files' graphs")
    same_graph = certify_files(*models)
    _say_lines(same_graph)
    _say_stage("both", "scoring the checkpoints and the exported files on the test split")
    scores = _score(out, data)
    _say_stage("both", "timing")
    latency = _time(out, data)
    _say_stage("regulated", "predicting the test photos")
    with open_runtime(out / "deploy" / "regulated") as runtime:
        predict_folder(runtime, [data / "images" / "test"], out / "masks", overlays=True)
    curves = {kind: _curves(out / "runs" / kind / METRICS) for kind in KINDS}
    findings = DemoFindings(out, steps, seed, exports, same_graph, scores, latency, curves)
    report = out / "report.html"
    write_report(demo_report(findings), report)
    passed = _passed(exports, same_graph, scores)
    _say_stage("done", "what came out")
    tellers = {True: console.done, False: console.failed, None: console.say}
    for verdict in demo_verdicts(findings):
        tellers[verdict.passed](f"{verdict.figure}: {verdict.claim}")
    console.done(f"wrote {report}: open it in a browser")
    return DemoOutcome(report, passed, _summary(report, passed, findings))


def _claim(out: Path, settings: dict[str, int], force: bool) -> None:
    """Makes `out` this demo's folder, or finds that it is."""
    mark = out / MARK
    if force and mark.exists():
        shutil.rmtree(out)
    if mark.exists():
        found = read_json(mark)
        if found != settings:
            raise UserError(
                f"{out} holds a demo with {_listed(found)}, not {_listed(settings)}: "
                "choose another --out, or --force to replace it"
            )
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"{out} holds other files: choose an empty folder with --out")
    else:
        write_json(mark, settings)


def _listed(settings: dict[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _say_stage(name: str, doing: str) -> None:
    console.say(f"\n{name}: {doing}")


def _say_lines(certificate: Certificate) -> None:
    for line in certificate.lines:
        if line.passed is not None:
            tell = console.done if line.passed else console.failed
            tell(f"{line.name}: {line.detail}")


def _train(kind: str, data: Path, folder: Path, steps: int, seed: int) -> None:
    config = TrainConfig(
        data=data,
        network=NETWORK,
        regulation=RegulationConfig(enabled=kind == "regulated"),
        steps=steps,
        crop=(96, 128),
        # So short a training can't afford the usual variety of sizes and colours.
        scale=(0.9, 1.2),
        colour=0.1,
        lr=0.1,
        class_weights="median-frequency",
        val_every=max(1, steps // 4),
        seed=seed,
        device="cpu",
    )
    if (folder / STATE).exists():
        train(config, folder, resume=True)
    else:
        train(config, folder, force=folder.exists())


def _score(out: Path, data: Path) -> dict[str, dict[str, Scores]]:
    """kind -> "checkpoint" or "file" -> scores on the test split."""
    dataset = open_dataset(data, "test")
    found: dict[str, dict[str, Scores]] = {}
    for kind in KINDS:
        places = {"checkpoint": out / "runs" / kind, "file": out / "deploy" / kind}
        found[kind] = {}
        for name, path in places.items():
            with open_runtime(path) as runtime:
                found[kind][name] = evaluate(runtime, dataset)
    return found


def _time(out: Path, data: Path) -> LatencyReport:
    left_in = out / "deploy" / "exits-left-in.onnx"
    export_with_exits(out / "runs" / "regulated", left_in)
    return bench(
        [out / "deploy" / kind for kind in KINDS],
        extra=[("exits left in", left_in)],
        size=(240, 320),
        rounds=BENCH_ROUNDS,
    )


def _curves(metrics: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def _passed(
    exports: dict[str, Certificate], same_graph: Certificate, scores: dict[str, dict[str, Scores]]
) -> bool:
    as_accurate = [
        abs(found["checkpoint"].miou - found["file"].miou) <= MIOU_TOLERANCE
        for found in scores.values()
    ]
    return all([same_graph.passed, *(one.passed for one in exports.values()), *as_accurate])


def _summary(report: Path, passed: bool, findings: DemoFindings) -> dict[str, Any]:
    latency = findings.latency
    ratios = {e.name: e.ratio.model_dump() for e in latency.entries if e.ratio is not None}
    return {
        "report": str(report),
        "passed": passed,
        "certificates": {kind: one.passed for kind, one in findings.exports.items()},
        "same_graph": findings.same_graph.passed,
        "test_miou": {
            kind: {name: score.miou for name, score in found.items()}
            for kind, found in findings.scores.items()
        },
        "latency_ratio": ratios,
        "noise_floor": None if latency.floor is None else latency.floor.model_dump(),
    }
