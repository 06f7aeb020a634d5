"""The demo's page: what was found, in the order in which people ask."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srdeploy.cli.with_exits import load_regulated
from srdeploy.data import open_dataset
from srdeploy.export.certificate import Certificate
from srdeploy.imaging import Pixels, colour_table, fit, restore
from srdeploy.metrics import percent
from srdeploy.serve import charts
from srdeploy.serve.bench.contents import warnings
from srdeploy.serve.bench.page import bench_cards, bench_sections
from srdeploy.serve.bench.results import BenchReport
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
    bench: BenchReport
    """Latency of both files and of the graph with its exits left in; accuracy on the test split."""
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
            *bench_sections(findings.bench, (), None),
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
    yield from bench_cards(findings.bench)
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
