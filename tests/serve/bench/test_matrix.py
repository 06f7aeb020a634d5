"""A whole benchmark on graphs with known answers: what stands in its report."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from srdeploy.data import open_dataset
from srdeploy.errors import UserError
from srdeploy.runtimes.registry import open_runtime
from srdeploy.serve.bench.entries import (
    BenchEntry,
    Setting,
    bench_images,
    every_setting,
    short_names,
)
from srdeploy.serve.bench.matrix import Benchmark
from srdeploy.serve.bench.measure import BenchPlan, Measurements, measure
from srdeploy.serve.bench.results import BenchReport, LatencyOutcome, PartialFile
from srdeploy.spec import Spec

MakeGraph = Callable[..., Path]

AUTO = Setting("auto", None, 1, None)
BRIEF = BenchPlan(budget_s=0.5)


def entries(*paths: Path) -> list[BenchEntry]:
    return [BenchEntry(name, path) for name, path in zip(short_names(paths), paths, strict=True)]


def test_a_slower_graph_is_different_and_the_first_has_no_verdict(make_graph: MakeGraph) -> None:
    quick, slow = make_graph("quick.onnx", work=2), make_graph("slow.onnx", work=20)
    job = Benchmark(threads=1, plan=BenchPlan(budget_s=4), costs=False)
    report, photos = job.run(
        entries(quick, slow), [Setting("auto", None, 1, (128, 128))], "srdeploy bench"
    )
    (cell,) = report.cells
    first, other = cell.rows
    assert (first.end_to_end.verdict, first.end_to_end.ratio) == (None, None)
    assert other.end_to_end.ratio is not None
    assert other.end_to_end.ratio.value > 2
    assert other.end_to_end.verdict is not None
    assert other.end_to_end.verdict.outcome is LatencyOutcome.DIFFERENT
    assert not report.passed
    assert photos == []
    assert cell.size == (128, 128)
    runs = 2 * cell.blocks  # of one session in one round
    assert {len(one) for one in first.end_to_end.rounds_ms} == {2 * runs}
    assert {len(one) for one in other.end_to_end.rounds_ms} == {runs}
    assert len(other.end_to_end.rounds_ms) == cell.rounds == len(other.end_to_end.round_ratios)
    median = np.median(np.concatenate(other.end_to_end.rounds_ms))
    assert other.end_to_end.quantiles.median.value == pytest.approx(median, abs=1e-3)
    assert other.images_per_s == pytest.approx(1000 / median, rel=1e-3)
    assert other.parameters == 9 + 9 * 49
    assert other.file_bytes == slow.stat().st_size


def test_the_report_survives_its_json(make_graph: MakeGraph) -> None:
    job = Benchmark(threads=1, plan=BRIEF, costs=False)
    report, _ = job.run(entries(make_graph("a.onnx"), make_graph("b.onnx")), [AUTO], "srdeploy x")
    assert BenchReport.model_validate_json(report.model_dump_json()) == report


def test_every_setting_gets_a_cell(make_graph: MakeGraph) -> None:
    settings = every_setting(["onnxruntime", "openvino"], [None], [1, 2], [(32, 40)])
    job = Benchmark(threads=1, plan=BRIEF, costs=False)
    report, _ = job.run(entries(make_graph()), settings, "srdeploy bench")
    assert [(cell.runtime, cell.batch, cell.size) for cell in report.cells] == [
        ("onnxruntime", 1, (32, 40)),
        ("onnxruntime", 2, (32, 40)),
        ("openvino", 1, (32, 40)),
        ("openvino", 2, (32, 40)),
    ]
    assert [cell.rows[0].backend for cell in report.cells] == ["onnxruntime"] * 2 + ["openvino"] * 2


def test_costs_are_those_of_each_artifact(make_graph: MakeGraph) -> None:
    small, large = make_graph("small.onnx"), make_graph("large.onnx", work=3)
    job = Benchmark(threads=1, plan=BRIEF)
    report, _ = job.run(entries(small, large), [Setting("auto", None, 2, (32, 32))], "srdeploy")
    first, other = report.cells[0].rows
    assert first.gmacs == pytest.approx(2 * 32 * 32 * 9 / 1e9)
    assert other.gmacs == pytest.approx(2 * 32 * 32 * (9 + 3 * 9 * 49) / 1e9)
    assert first.footprint is not None
    assert first.footprint.peak_mib > first.footprint.own_mib > 0


def test_accuracy_is_scored_but_not_of_rows_to_be_looked_at(
    make_graph: MakeGraph, tiny_data: Path
) -> None:
    a, b = make_graph("a.onnx"), make_graph("b.onnx")
    extra = BenchEntry("with more outputs", make_graph("both.onnx", output="both"), judged=False)
    job = Benchmark(
        threads=1, plan=BRIEF, dataset=open_dataset(tiny_data, "val"), limit=2, costs=False
    )
    report, _ = job.run([*entries(a, b), extra], [AUTO], "srdeploy bench")
    names = [row.name for row in report.cells[0].rows]
    assert names == ["a.onnx", "b.onnx", "with more outputs"]
    assert report.cells[0].rows[2].end_to_end.verdict is None
    assert report.cells[0].size == (40, 48)
    assert report.accuracy is not None
    assert report.accuracy.images == 2
    assert [(row.name, row.scores.miou) for row in report.accuracy.rows] == [
        ("a.onnx", 1.0),
        ("b.onnx", 1.0),
    ]


def test_an_export_is_held_against_its_checkpoint_and_torch_runs_that(
    run_folder: Path, exported: dict[str, Path], tiny_data: Path
) -> None:
    graph = exported["uint8-labels"]
    entry = BenchEntry(
        "export", graph, checkpoint=run_folder, forms={("torch", None): (run_folder,)}
    )
    job = Benchmark(threads=1, plan=BRIEF, dataset=open_dataset(tiny_data, "val"), costs=False)
    settings = every_setting(["onnxruntime", "torch"], [None], [1], [None])
    report, _ = job.run([entry], settings, "srdeploy bench")
    graphs, torches = (cell.rows[0] for cell in report.cells)
    assert (graphs.backend, torches.backend) == ("onnxruntime", "torch")
    assert torches.path == str(run_folder)
    assert 0.9 * torches.parameters < graphs.parameters < torches.parameters
    assert report.accuracy is not None
    match = report.accuracy.rows[0].checkpoint
    assert match is not None
    assert match.passed


def test_a_graph_with_exits_stands_beside_graphs_and_not_beside_torch(
    run_folder: Path, exported: dict[str, Path], with_exits: Path
) -> None:
    plain = BenchEntry("plain", exported["uint8-labels"], forms={("torch", None): (run_folder,)})
    left_in = BenchEntry("exits left in", with_exits, judged=False)
    job = Benchmark(threads=1, plan=BRIEF, costs=False)
    settings = every_setting(["onnxruntime", "torch"], [None], [1], [(40, 48)])
    report, _ = job.run([plain, left_in], settings, "srdeploy bench")
    graphs, torches = report.cells
    assert [row.name for row in graphs.rows] == ["plain", "exits left in"]
    assert graphs.rows[1].parameters > graphs.rows[0].parameters
    assert [row.name for row in torches.rows] == ["plain"]


def test_builds_of_one_artifact_take_turns(make_graph: MakeGraph) -> None:
    builds = tuple(make_graph(f"{number}/model.onnx") for number in range(3))
    entry = BenchEntry("engine", builds[0], forms={("tensorrt", None): builds})
    setting = Setting("tensorrt", None, 1, None)
    assert [entry.file(setting, opening) for opening in range(4)] == [*builds, builds[0]]
    assert entry.file(AUTO, 1) == builds[0]


def test_what_cannot_run_is_said_before_anything_is_timed(
    make_graph: MakeGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("timed before all was tried")

    monkeypatch.setattr("srdeploy.serve.bench.matrix.measure", never)
    fixed = make_graph("fixed.onnx", size=(1, 64, 64))
    job = Benchmark(threads=1, plan=BRIEF, costs=False)
    settings = every_setting(["auto"], [None], [1, 2], [(64, 64)])
    with pytest.raises(UserError, match="takes only images of .*, not"):
        job.run(entries(make_graph(), fixed), settings, "srdeploy bench")


def test_a_foreign_graph_is_timed_with_the_classes_given_for_it(
    make_graph: MakeGraph, tiny_spec: Spec
) -> None:
    foreign = BenchEntry("foreign", make_graph("foreign.onnx", spec=None), spec=tiny_spec)
    job = Benchmark(threads=1, plan=BRIEF, costs=False)
    report, _ = job.run([*entries(make_graph()), foreign], [AUTO], "srdeploy bench")
    assert [row.name for row in report.cells[0].rows] == ["colour.onnx", "foreign"]


def test_a_fixed_shape_sets_the_size(make_graph: MakeGraph) -> None:
    job = Benchmark(threads=1, plan=BRIEF, costs=False)
    report, _ = job.run(entries(make_graph(size=(1, 64, 32))), [AUTO], "srdeploy bench")
    assert report.cells[0].size == (64, 32)


def test_images_are_the_data_sets_photos_brought_to_the_size(
    make_graph: MakeGraph, tiny_data: Path
) -> None:
    dataset = open_dataset(tiny_data, "val")
    runtime = open_runtime(make_graph())
    images = bench_images(runtime, dataset, None, 4)
    assert images.shape == (4, 40, 48, 3)
    assert (images[0] == dataset.read(0)[0]).all()
    assert (images[3] == images[0]).all()
    assert bench_images(runtime, dataset, (64, 70), 1).shape == (1, 64, 70, 3)


def test_names_are_short_where_that_tells_them_apart() -> None:
    assert short_names([Path("a/x.onnx"), Path("a/y.onnx")]) == ["x.onnx", "y.onnx"]
    assert short_names([Path("a/m.onnx"), Path("b/m.onnx")]) == ["a/m.onnx", "b/m.onnx"]
    assert short_names([Path("m.onnx"), Path("m.onnx")]) == ["m.onnx", "m.onnx (2)"]


def test_a_stopped_benchmark_goes_on_with_the_settings_that_are_left(
    make_graph: MakeGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Benchmark(threads=1, plan=BRIEF, costs=False)
    chosen = entries(make_graph())
    settings = every_setting(["auto"], [None], [1, 2], [(32, 32)])
    calls: list[int] = []

    def stopped_at_the_second(*arguments: Any, **options: Any) -> Measurements:
        calls.append(arguments[1].shape[0])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*arguments, **options)

    monkeypatch.setattr("srdeploy.serve.bench.matrix.measure", stopped_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        job.run(chosen, settings, "srdeploy bench", PartialFile(tmp_path, resume=False))
    kept = (tmp_path / "partial.json").read_text()
    file = PartialFile(tmp_path, resume=True)
    report, _ = job.run(chosen, settings, "srdeploy bench", file)
    assert calls == [1, 2, 2]
    assert [cell.batch for cell in report.cells] == [1, 2]
    assert report.cells[0].model_dump(mode="json") == json.loads(kept)["cells"][0]
    file.end()
    assert not (tmp_path / "partial.json").exists()


def test_only_the_same_benchmark_is_resumed(make_graph: MakeGraph, tmp_path: Path) -> None:
    chosen = entries(make_graph())
    job = Benchmark(threads=1, plan=BRIEF, costs=False)
    job.run(chosen, [AUTO], "srdeploy bench", PartialFile(tmp_path, resume=False))
    make_graph(work=1)  # another graph under the same name
    with pytest.raises(UserError, match="of another benchmark .files differs"):
        job.run(chosen, [AUTO], "srdeploy bench", PartialFile(tmp_path, resume=True))


def test_there_must_be_something_to_resume(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no partial.json"):
        PartialFile(tmp_path, resume=True)
    with pytest.raises(UserError, match="--out names no folder"):
        PartialFile(None, resume=True)


def test_what_is_not_shown_says_which_budget_would_show_it(make_graph: MakeGraph) -> None:
    chosen = entries(make_graph("a.onnx"), make_graph("b.onnx"))
    job = Benchmark(threads=1, plan=BenchPlan(margin=1e-3, budget_s=0.5), costs=False)
    report, _ = job.run(chosen, [AUTO], "srdeploy bench")
    (cell,) = report.cells
    verdict = cell.rows[1].end_to_end.verdict
    assert verdict is not None
    if verdict.rounds_needed is None:
        assert "--budget" not in verdict.reason
    else:
        budget = int(verdict.reason.split("--budget ")[1].rstrip(")"))
        least = cell.seconds * verdict.rounds_needed / cell.rounds
        assert least <= budget <= 1.1 * least + 10
