"""The benchmark's design: order, pairing, intervals, what is reported."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from srdeploy.data import open_dataset
from srdeploy.errors import UserError
from srdeploy.serve.bench.measure import (
    LatencyReport,
    bench,
    bench_images,
    block_order,
    compare_latency,
    paired_ratio,
)
from srdeploy.serve.runtime import open_runtime
from srdeploy.spec import Spec

MakeGraph = Callable[..., Path]


@given(count=st.integers(1, 6), block=st.integers(0, 50))
def test_a_block_runs_everyone_twice_and_reads_the_same_backwards(count: int, block: int) -> None:
    order = block_order(count, block)
    assert order == order[::-1]
    assert Counter(order) == dict.fromkeys(range(count), 2)


def test_blocks_take_turns_in_who_starts() -> None:
    assert [block_order(3, block)[0] for block in range(6)] == [0, 1, 2, 0, 1, 2]


def test_the_interval_agrees_with_scipys_bootstrap() -> None:
    rng = np.random.default_rng(1)
    drift = rng.normal(10, 1, 60)
    baseline, other = drift + rng.normal(0, 0.1, 60), 1.1 * drift + rng.normal(0, 0.1, 60)
    ours = paired_ratio(baseline, other)
    theirs = stats.bootstrap(
        (baseline, other),
        lambda a, b, axis: np.median(b, axis=axis) / np.median(a, axis=axis),
        paired=True,
        n_resamples=4000,
        method="percentile",
        rng=np.random.default_rng(2),
    ).confidence_interval
    assert ours.value == np.median(other) / np.median(baseline)
    assert ours.low == pytest.approx(theirs.low, abs=0.01)
    assert ours.high == pytest.approx(theirs.high, abs=0.01)


@given(factor=st.floats(0.25, 4), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_an_exact_factor_is_found_whatever_the_machine_does(factor: float, seed: int) -> None:
    baseline = np.random.default_rng(seed).uniform(1, 100, 20)
    ratio = paired_ratio(baseline, factor * baseline, seed)
    assert ratio.value == pytest.approx(factor)
    assert ratio.low == pytest.approx(factor)
    assert ratio.high == pytest.approx(factor)


def test_a_slower_graph_is_found_slower_and_the_twin_is_not(make_graph: MakeGraph) -> None:
    images = np.zeros((1, 128, 128, 3), np.uint8)
    quick, slow = make_graph("quick.onnx", work=2), make_graph("slow.onnx", work=20)
    with (
        open_runtime(quick, threads=1) as first,
        open_runtime(slow, threads=1) as second,
        open_runtime(quick, threads=1) as twin,
    ):
        report = compare_latency([first, second], images, rounds=5, twin=twin)
    assert [entry.name for entry in report.entries] == ["quick.onnx", "slow.onnx"]
    baseline, other = report.entries
    assert baseline.ratio is None
    assert other.ratio is not None
    assert report.floor is not None
    assert other.ratio.value > 2 * report.floor.value
    assert (len(other.samples_ms), report.size, report.batch) == (10, (128, 128), 1)
    assert other.median_ms == pytest.approx(np.median(other.samples_ms), abs=1e-3)
    assert other.median_ms <= other.p90_ms <= other.p99_ms <= max(other.samples_ms) + 1e-3
    assert other.file_bytes == slow.stat().st_size
    assert other.weights == 9 + 9 * 49


def test_bench_scores_each_artifact_but_not_the_extra_ones(
    make_graph: MakeGraph, tiny_data: Path
) -> None:
    a, b = make_graph("a/model.onnx"), make_graph("b/model.onnx")
    both = make_graph("both.onnx", output="both")
    report = bench(
        [a.parent, b.parent],
        extra=[("with more outputs", both)],
        dataset=open_dataset(tiny_data, "val"),
        rounds=2,
        threads=1,
        limit=2,
    )
    assert [entry.name for entry in report.entries] == ["a", "b", "with more outputs"]
    assert [entry.miou for entry in report.entries] == [1.0, 1.0, None]
    assert report.size == (40, 48)
    assert LatencyReport.model_validate_json(report.model_dump_json()) == report


def test_a_foreign_graph_is_timed_beside_ours_and_the_given_classes_are_for_it_alone(
    make_graph: MakeGraph, tiny_spec: Spec
) -> None:
    ours, foreign = make_graph("ours.onnx"), make_graph("foreign.onnx", spec=None)
    given = tiny_spec.model_copy(update={"mean": (0.5, 0.5, 0.5)})
    report = bench([ours, foreign], rounds=2, threads=1, spec=given)
    assert [entry.name for entry in report.entries] == ["ours.onnx", "foreign.onnx"]
    with pytest.raises(UserError, match="leave --classes away"):
        bench([ours], rounds=2, threads=1, spec=given)


def test_a_run_and_its_export_are_compared_in_their_own_runtimes(
    run_folder: Path, exported: dict[str, Path]
) -> None:
    import torch

    from srdeploy.runs import load_network, open_run

    report = bench([run_folder, exported["uint8-labels"]], rounds=2, threads=1)
    run, export = report.entries
    assert (run.backend, export.backend) == ("torch", "onnxruntime")
    stored = load_network(open_run(run_folder)).state_dict().values()
    assert run.weights == sum(value.numel() for value in stored if value.dtype == torch.float32)
    assert 0.9 * run.weights < export.weights < run.weights


def test_artifacts_with_one_name_are_told_apart_by_path(make_graph: MakeGraph) -> None:
    a, b = make_graph("a/model.onnx"), make_graph("b/model.onnx")
    report = bench([a, b], rounds=2, threads=1)
    assert [entry.name for entry in report.entries] == [str(a), str(b)]


def test_a_fixed_shape_sets_the_size(make_graph: MakeGraph) -> None:
    report = bench([make_graph(size=(1, 64, 32))], rounds=2, threads=1)
    assert report.size == (64, 32)


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


def test_the_table_names_ratio_interval_and_floor(make_graph: MakeGraph) -> None:
    report = bench([make_graph("a.onnx"), make_graph("b.onnx")], rounds=2, threads=1)
    table = report.table()
    assert table.row_count == 2
    assert str(report.floor) in str(table.caption)
    assert str(report.entries[1].ratio) in [cell for c in table.columns for cell in c.cells]
