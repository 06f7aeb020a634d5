"""The demo's page: what was found, in the order in which people ask."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srdeploy import console
from srdeploy.artifacts.artifact import MODEL
from srdeploy.data import open_dataset
from srdeploy.data.synth import synthesise
from srdeploy.errors import UserError
from srdeploy.export.certificate import Certificate, certify_files
from srdeploy.export.pipeline import export_run
from srdeploy.files import read_json, write_json
from srdeploy.imaging import Pixels, colour_table, fit, restore
from srdeploy.pages import charts
from srdeploy.pages.report import (
    Charts,
    Gallery,
    Picture,
    Report,
    Section,
    Table,
    Verdict,
    chart,
    class_legend,
    drawing,
    photo,
    write_report,
)
from srdeploy.pages.text import tell_verdicts
from srdeploy.runs import METRICS, STATE, NetworkConfig
from srdeploy.runtimes.registry import open_runtime
from srdeploy.serve.bench.entries import BenchEntry, Setting
from srdeploy.serve.bench.matrix import Benchmark
from srdeploy.serve.bench.measure import BenchPlan
from srdeploy.serve.bench.page import accuracy_text, bench_sections, bench_verdicts
from srdeploy.serve.bench.results import BenchReport, CheckpointMatch
from srdeploy.serve.bench.tables import warnings
from srdeploy.serve.folders.predict import predict_photos
from srdeploy.serve.folders.settings import PredictSettings
from srdeploy.serve.scheduling.planner import ModelSource
from srdeploy.spec import Spec
from srdeploy.studies.with_exits import export_with_exits, load_regulated
from srdeploy.train.config import TrainConfig
from srdeploy.train.loop import train
from srdeploy.train.pictures import predict_exits, spread
from srdeploy.train.regulation_config import RegulationConfig

MARKS = {True: "✓", False: "✗", None: "recorded"}
PHOTOS = 6
"""Test photos shown."""


@dataclass(frozen=True)
class DemoFindings:
    """Everything that the stages measured; dictionaries go by "baseline" and "regulated"."""

    folder: Path
    steps: int
    seed: int
    exports: dict[str, Certificate]
    same_graph: Certificate
    """Baseline's file against the regulated network's file."""
    bench: BenchReport
    """Latency of both files and of the graph with its exits left in; accuracy on the test split."""
    curves: dict[str, list[dict[str, Any]]]
    """Records of metrics.jsonl."""


def demo_report(findings: DemoFindings) -> Report:
    """The page as data."""
    return Report(
        title="Trained with self-regulation, deployed as the plain network",
        lead=(
            "Two runs of one network on synthetic scenes, equal but for self-regulation. "
            "The exits that regulated the second one are gone from the file that is deployed."
        ),
        verdicts=list(demo_verdicts(findings)),
        sections=[
            _pictures(findings),
            *bench_sections(findings.bench),
            _certificates(findings),
            _training(findings),
        ],
        command=findings.bench.command,
        environment=findings.bench.environment,
        warnings=warnings(findings.bench),
    )


def demo_verdicts(findings: DemoFindings) -> Iterator[Verdict]:
    """The answers, the most important first."""
    certified = all(one.passed for one in findings.exports.values())
    same = findings.same_graph.passed
    yield Verdict(
        "the regulated network's graph against the baseline's: digest and walk",
        "identical graphs" if same else "graphs differ",
        same,
    )
    yield Verdict(
        "certificates of both exports: identity, no survivors, parity with torch",
        "both certified" if certified else "not certified",
        certified,
    )
    yield from bench_verdicts(findings.bench)
    left_in = findings.bench.cells[0].rows[2].end_to_end.ratio
    assert left_in is not None  # only the first artifact has none
    yield Verdict(
        f"latency with the exits left in, over baseline; 95 % interval {left_in.low:.3f} to "
        f"{left_in.high:.3f}: what stripping saves",
        f"× {left_in.value:.3f}",
        None,
    )


def _pictures(findings: DemoFindings) -> Section:
    dataset = open_dataset(findings.folder / "data", "test")
    rows = []
    run, regulated = load_regulated(findings.folder / "runs" / "regulated")
    spec = run.spec
    deploy = findings.folder / "deploy"
    with (
        open_runtime(deploy / "baseline") as baseline,
        open_runtime(deploy / "regulated") as deployed,
    ):
        for index in spread(len(dataset), PHOTOS):
            image, truth = dataset.read(index)
            fitted = fit(image, spec)
            exits = predict_exits(regulated, fitted, spec)[:-1]
            masks = [*(one.run(fitted[None])[0] for one in (baseline, deployed)), *exits]
            row = [photo(image, dataset.items[index].name)]
            row.append(drawing(colour_table(spec)[truth], "as drawn"))
            row += [_mask(mask, image, truth, spec) for mask in masks]
            rows.append(row)
    header = ["photo", "truth", "baseline", "regulated"]
    header += [f"exit {i + 1}" for i in range(len(regulated.taps))]
    return Section(
        "What the networks see",
        "Test photos and masks of the deployed files; exits 1 (shallowest) onward are what the "
        "regulated network's stages said in training, and are not deployed. The figure below each "
        "mask is its pixel accuracy.",
        [class_legend(spec), Gallery(header, rows)],
    )


def _mask(mask: Pixels, image: Pixels, truth: Pixels, spec: Spec) -> Picture:
    own = restore(mask, image.shape[0], image.shape[1])
    return drawing(colour_table(spec)[own], accuracy_text(own, truth, spec))


def _certificates(findings: DemoFindings) -> Section:
    named = {
        "baseline": findings.exports["baseline"],
        "regulated": findings.exports["regulated"],
        "regulated against baseline": findings.same_graph,
    }
    return Section(
        title="Certificates",
        text="Each export against a plain network built fresh from its name, and torch against the "
        "file on photos of the val split; then the two files against each other.",
        blocks=[
            Table(
                name,
                ("line", "verdict", "finding"),
                [[line.name, MARKS[line.passed], line.detail] for line in certificate.lines],
                prose=True,
            )
            for name, certificate in named.items()
        ],
    )


def _training(findings: DemoFindings) -> Section:
    loss, miou = {}, {}
    for kind, records in findings.curves.items():
        steps = [r for r in records if r["kind"] == "train"]
        loss[kind] = ([r["step"] for r in steps], [r["terms"]["main"] for r in steps])
        scored = [r for r in records if r["kind"] == "val"]
        miou[kind] = ([r["step"] for r in scored], [100 * r["miou"] for r in scored])
    terms: dict[str, tuple[list[float], list[float]]] = {}
    for record in findings.curves["regulated"]:
        if record["kind"] == "train":
            for name, value in record["terms"].items():
                xs, ys = terms.setdefault(name, ([], []))
                xs.append(record["step"])
                ys.append(value)
    drawn = [
        chart("The network's own loss", charts.curves, loss, "step", "cross-entropy"),
        chart("Validation", charts.curves, miou, "step", "mIoU on val, %"),
        chart("The regulated run's terms, unweighted", charts.curves, terms, "step", "loss"),
    ]
    return Section("Training", blocks=[Charts(drawn)])


# Demo stages

KINDS = ("baseline", "regulated")
MARK = "demo.json"
NETWORK = NetworkConfig(name="unet", options={"width": 8})
"""Small enough to learn the scenes in about a minute on two cores."""
BENCH_SECONDS = 30.0
"""Enough for a verdict on a calm machine; on a noisy one, the page says that more is needed."""


@dataclass(frozen=True)
class DemoOutcome:
    """How the demo ended."""

    report: Path
    passed: bool
    """Certificates passed, graphs equal, and the files give the checkpoints' labels."""
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
    _say_stage("both", "timing the files, and scoring them on the test split")
    bench = _bench(out, data, f"srdeploy demo --steps {steps} --seed {seed}")
    _say_stage("regulated", "predicting the test photos")
    regulated = ModelSource("regulated", out / "deploy" / "regulated")
    photos = [str(data / "images" / "test")]
    predict_photos(regulated, photos, str(out / "masks"), PredictSettings(overlay=True))
    curves = {kind: _curves(out / "runs" / kind / METRICS) for kind in KINDS}
    findings = DemoFindings(out, steps, seed, exports, same_graph, bench, curves)
    report = out / "report.html"
    write_report(demo_report(findings), report)
    passed = _passed(exports, same_graph, bench)
    _say_stage("done", "what came out")
    tell_verdicts(demo_verdicts(findings))
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


def _bench(out: Path, data: Path, command: str) -> BenchReport:
    left_in = out / "deploy" / "exits-left-in.onnx"
    export_with_exits(out / "runs" / "regulated", left_in)
    entries = [
        BenchEntry(kind, out / "deploy" / kind, checkpoint=out / "runs" / kind) for kind in KINDS
    ]
    entries.append(BenchEntry("exits left in", left_in, judged=False))
    job = Benchmark(plan=BenchPlan(budget_s=BENCH_SECONDS), dataset=open_dataset(data, "test"))
    report, _ = job.run(entries, [Setting("onnxruntime", None, 1, (240, 320))], command)
    return report


def _curves(metrics: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def _passed(exports: dict[str, Certificate], same_graph: Certificate, bench: BenchReport) -> bool:
    """Whether all holds that has to on any machine: a latency that can't be told apart on a noisy
    one is no fault of the files."""
    matches = [match.passed for match in _matches(bench).values()]
    return all([same_graph.passed, *(one.passed for one in exports.values()), *matches])


def _matches(bench: BenchReport) -> dict[str, CheckpointMatch]:
    assert bench.accuracy is not None
    return {row.name: row.checkpoint for row in bench.accuracy.rows if row.checkpoint is not None}


def _summary(report: Path, passed: bool, findings: DemoFindings) -> dict[str, Any]:
    bench = findings.bench
    assert bench.accuracy is not None
    (cell,) = bench.cells
    matches = _matches(bench)
    miou = {row.name: row.scores.miou for row in bench.accuracy.rows}
    return {
        "report": str(report),
        "passed": passed,
        "certificates": {kind: one.passed for kind, one in findings.exports.items()},
        "same_graph": findings.same_graph.passed,
        "test_miou": {
            kind: {"checkpoint": share - matches[kind].miou_difference, "file": share}
            for kind, share in miou.items()
        },
        "equal_labels": {kind: match.agreement for kind, match in matches.items()},
        "latency": {
            row.name: {
                "ratio": None
                if row.end_to_end.ratio is None
                else row.end_to_end.ratio.model_dump(),
                "verdict": None
                if row.end_to_end.verdict is None
                else row.end_to_end.verdict.model_dump(mode="json"),
            }
            for row in cell.rows
        },
        "noise_floor": cell.floor.model_dump(),
    }
