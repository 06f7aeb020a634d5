"""The demo's page: what was found, in the order in which people ask."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from srdeploy.cli.with_exits import load_regulated
from srdeploy.data import open_dataset
from srdeploy.environment import describe_environment
from srdeploy.export.certificate import Certificate
from srdeploy.imaging import Pixels, colour_table, fit, restore
from srdeploy.metrics import Scores, percent
from srdeploy.serve import charts
from srdeploy.serve.bench.measure import Latency, LatencyReport
from srdeploy.serve.report import Picture, Report, Section, Table, Verdict, chart, drawing, photo
from srdeploy.serve.runtime import open_runtime
from srdeploy.spec import Spec
from srdeploy.train.pictures import predict_exits, spread

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
    scores: dict[str, dict[str, Scores]]
    latency: LatencyReport
    curves: dict[str, list[dict[str, Any]]]
    """Records of metrics.jsonl."""


def demo_report(findings: DemoFindings) -> Report:
    """The page as data."""
    return Report(
        title="Trained with self-regulation, deployed as the plain network",
        lead=(
            "Two runs of one network on made-up scenes, equal but for self-regulation. "
            "The exits that regulated the second one are gone from the file that is deployed."
        ),
        verdicts=list(demo_verdicts(findings)),
        sections=[
            _pictures(findings),
            _accuracy(findings),
            _latency(findings),
            _certificates(findings),
            _training(findings),
        ],
        command=f"srdeploy demo --steps {findings.steps} --seed {findings.seed}",
        environment=describe_environment(),
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
    plain, left_in = findings.latency.entries[1:3]
    yield _ratio_verdict("latency of regulated over baseline", plain)
    yield _ratio_verdict("latency with the exits left in, over baseline", left_in)
    gain = _miou(findings, "regulated") - _miou(findings, "baseline")
    yield Verdict(
        "points of test mIoU, regulated against baseline: one seed, so a sample, not a proof",
        f"{100 * gain:+.2f} mIoU",
        None,
    )


def _ratio_verdict(claim: str, entry: Latency) -> Verdict:
    ratio = entry.ratio
    assert ratio is not None  # only the first artifact has none
    interval = f"95 % interval {ratio.low:.3f} to {ratio.high:.3f}"
    return Verdict(f"{claim}; {interval}", f"× {ratio.value:.3f}", None)


def _miou(findings: DemoFindings, kind: str) -> float:
    return findings.scores[kind]["file"].miou


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
        title="What the networks see",
        text=(
            "Test photos and masks of the deployed files; exits 1 (shallowest) onward are what the "
            "regulated network's stages said in training, and are not deployed. The figure below "
            "each mask is its pixel accuracy."
        ),
        gallery_header=header,
        gallery=rows,
        legend=[
            (name, f"rgb({red}, {green}, {blue})")
            for name, (red, green, blue) in zip(spec.classes, spec.palette, strict=True)
        ],
    )


def _mask(mask: Pixels, image: Pixels, truth: Pixels, spec: Spec) -> Picture:
    own = restore(mask, image.shape[0], image.shape[1])
    valid = truth != spec.ignore_index
    accuracy = float((own[valid] == truth[valid]).mean()) if valid.any() else None
    return drawing(colour_table(spec)[own], f"{percent(accuracy)} %")


def _accuracy(findings: DemoFindings) -> Section:
    scores = findings.scores
    names = list(scores["baseline"]["file"].iou)
    rows = []
    for kind, found in scores.items():
        for place, label in (("checkpoint", "torch"), ("file", "ONNX")):
            one = found[place]
            figures = (one.miou, one.pixel_accuracy, one.failure1, one.failure2)
            rows.append([f"{kind}, {label}", *map(percent, figures)])
    bars = {
        kind: [None if v is None else 100 * v for v in found["file"].iou.values()]
        for kind, found in scores.items()
    }
    return Section(
        title="Accuracy on the test split",
        text=(
            "Failure-1: share of small objects that are missed. Failure-2: share of large objects' "
            "pixels that are given to another class. For both, less is better."
        ),
        tables=[
            Table(
                "All figures in percent",
                ("network", "mIoU", "pixel accuracy", "Failure-1", "Failure-2"),
                rows,
            )
        ],
        charts=[chart(charts.grouped_bars(names, bars, "IoU, %"), "IoU per class, ONNX files")],
    )


def _latency(findings: DemoFindings) -> Section:
    report = findings.latency
    rows = [
        [
            entry.name,
            f"{entry.median_ms:.2f}",
            f"{entry.p90_ms:.2f}",
            f"{entry.p99_ms:.2f}",
            "1" if entry.ratio is None else str(entry.ratio),
            f"{entry.file_bytes / 1e6:.2f}",
        ]
        for entry in report.entries
    ]
    samples = {entry.name: np.asarray(entry.samples_ms) for entry in report.entries}
    floor = "" if report.floor is None else f" The baseline against itself: {report.floor}."
    height, width = report.size
    return Section(
        title="Latency",
        text=(
            f"onnxruntime on the CPU, {width}x{height}, batch {report.batch}; {report.rounds} "
            f"interleaved blocks, each artifact twice in each.{floor} The graphs are identical, so "
            "any further difference is noise of the machine."
        ),
        tables=[
            Table(
                "Wall time per image, milliseconds",
                ("artifact", "median", "p90", "p99", "ratio of medians [95 %]", "file, MB"),
                rows,
            )
        ],
        charts=[chart(charts.distributions(samples, "ms"), "Latency of all runs")],
    )


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
        tables=[
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
    return Section(
        title="Training",
        charts=[
            chart(charts.curves(loss, "step", "cross-entropy"), "The network's own loss"),
            chart(charts.curves(miou, "step", "mIoU on val, %"), "Validation"),
            chart(charts.curves(terms, "step", "loss"), "The regulated run's terms, unweighted"),
        ],
    )
