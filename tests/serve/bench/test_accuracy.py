"""Accuracy in one pass: the scores of evaluate, gains with intervals, checkpoints, and pictures."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from srdeploy.data import DataSet, open_dataset
from srdeploy.errors import UserError
from srdeploy.export.comparison import COMPARING_FP32, LIMITS
from srdeploy.imaging import Pixels
from srdeploy.metrics import MEASURES, TALLIES, Counts, Labels, Score, measures
from srdeploy.runtimes.base import Runtime
from srdeploy.runtimes.registry import open_runtime
from srdeploy.serve.bench.accuracy import (
    ANYTHING,
    MATCH_LIMITS,
    limits_for,
    measure_accuracy,
    paired_gains,
)
from srdeploy.serve.bench.results import CheckpointMatch
from srdeploy.serve.evaluate import evaluate
from srdeploy.spec import InputPolicy, Spec

MakeGraph = Callable[..., Path]

SPEC = Spec(
    classes=("background", "cat", "dog", "cow"),
    palette=tuple((i, i, i) for i in range(4)),
    scored=(0, 1, 2),
)


@pytest.fixture
def val(tiny_data: Path) -> DataSet:
    return open_dataset(tiny_data, "val")


@pytest.fixture
def train(tiny_data: Path) -> DataSet:
    return open_dataset(tiny_data, "train")


def maps(rng: np.random.Generator, photos: int) -> list[tuple[Labels, Labels]]:
    """True and predicted labels of blocks of 4 and 16 pixels, so that components of all sizes
    occur; some ignored, some wrong."""
    pairs = []
    for _ in range(photos):
        truth = rng.choice([0, 1, 2, 3, 255], (3, 3)).astype(np.uint8).repeat(16, 0).repeat(16, 1)
        small = rng.random((12, 12)).repeat(4, 0).repeat(4, 1) < 0.05
        truth[small] = rng.integers(1, 3)
        wrong = rng.random(truth.shape) < rng.choice([0, 0.2, 0.6])
        guess = np.where(wrong | (truth == 255), rng.integers(0, 4, truth.shape), truth)
        pairs.append((truth, guess.astype(np.uint8)))
    return pairs


def tallies_of(pairs: list[tuple[Labels, Labels]]) -> Counts:
    """int64 [photos, K, T], each from a score of its own."""
    rows = []
    for truth, guess in pairs:
        score = Score(SPEC)
        score.update(truth, guess)
        rows.append(score.tallies())
    return np.stack(rows)


def gain_of(ours: Counts, theirs: Counts) -> npt.NDArray[np.float64]:
    """Of photos together, [photos, K, T] each: differences of the measures, float64 [3]."""
    gain: npt.NDArray[np.float64] = measures(ours.sum(axis=0), SPEC) - measures(
        theirs.sum(axis=0), SPEC
    )
    return gain


def one_photo(**counts: int) -> Counts:
    """Tallies int64 [K, T] of one photo where cat is counted as said, and background is right."""
    photo = np.zeros((4, len(TALLIES)), np.int64)
    photo[0, :3] = 100
    for name, count in counts.items():
        photo[1, TALLIES.index(name)] = count
    return photo


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), photos=st.integers(1, 5))
def test_summed_tallies_of_single_images_measure_exactly_what_the_score_of_all_says(
    seed: int, photos: int
) -> None:
    pairs = maps(np.random.default_rng(seed), photos)
    whole = Score(SPEC)
    for truth, guess in pairs:
        whole.update(truth, guess)
    tallies = tallies_of(pairs)
    np.testing.assert_array_equal(tallies.sum(axis=0), whole.tallies())
    if whole.confusion.sum() == 0:
        assert np.isnan(measures(tallies.sum(axis=0), SPEC)[0])
        return
    result = whole.result()
    expected = [getattr(result, name) for name in MEASURES]
    expected = [np.nan if value is None else value for value in expected]
    np.testing.assert_array_equal(measures(tallies.sum(axis=0), SPEC), expected)
    stacked = np.broadcast_to(tallies.sum(axis=0).astype(np.float64), (2, 3, 4, len(TALLIES)))
    np.testing.assert_array_equal(
        measures(stacked, SPEC), np.broadcast_to(np.array(expected, np.float64), (2, 3, 3))
    )


@settings(max_examples=25, deadline=None)
@given(confusion=hnp.arrays(np.int64, (4, 4), elements=st.integers(0, 9)))
def test_miou_of_tallies_equals_a_loop_over_the_confusion(confusion: Counts) -> None:
    confusion[3] = 0  # not scored
    tallies = np.zeros((4, len(TALLIES)), np.int64)
    tallies[:, 0], tallies[:, 1] = confusion.diagonal(), confusion.sum(axis=1)
    tallies[:, 2] = confusion.sum(axis=0)
    ious = []
    for index in (0, 1, 2):
        either = int(confusion[index].sum() + confusion[:, index].sum() - confusion[index, index])
        if either:
            ious.append(int(confusion[index, index]) / either)
    expected = sum(ious) / len(ious) if ious else np.nan
    assert measures(tallies, SPEC)[0] == pytest.approx(expected, nan_ok=True)


def test_the_gains_interval_is_that_of_a_plain_bootstrap_over_photos() -> None:
    rng = np.random.default_rng(3)
    pairs = maps(rng, 40)
    better = [(t, np.where(rng.random(t.shape) < 0.3, t % 5, g).astype(np.uint8)) for t, g in pairs]
    better = [(t, np.where(t == 255, 0, g).astype(np.uint8)) for t, g in better]
    ours, theirs = tallies_of(better), tallies_of(pairs)
    found = paired_gains(ours, theirs, SPEC)
    drawn = [rows for rows in rng.integers(0, 40, (800, 40))]
    values = np.array([gain_of(ours[rows], theirs[rows]) for rows in drawn])
    for place, name in enumerate(MEASURES):
        low, high = np.nanquantile(values[:, place], (0.025, 0.975))
        width = high - low
        assert width > 0
        assert found[name].low == pytest.approx(low, abs=0.1 * width)
        assert found[name].high == pytest.approx(high, abs=0.1 * width)
        assert found[name].value == gain_of(ours, theirs)[place]
    assert found["miou"].low > 0, "more pixels are right: the gain is beyond chance"


def test_a_gain_the_other_way_round_is_the_loss() -> None:
    rng = np.random.default_rng(5)
    ours, theirs = tallies_of(maps(rng, 12)), tallies_of(maps(rng, 12))
    forth, back = paired_gains(ours, theirs, SPEC), paired_gains(theirs, ours, SPEC)
    assert set(forth) == set(MEASURES)
    for name, gain in forth.items():
        turned = (-back[name].value, -back[name].high, -back[name].low)
        assert (gain.value, gain.low, gain.high) == pytest.approx(turned, abs=1e-12)


def test_what_makes_a_photo_hard_cancels() -> None:
    """Equal artifacts have no gain, however much their photos differ."""
    tallies = tallies_of(maps(np.random.default_rng(7), 12))
    for gain in paired_gains(tallies, tallies.copy(), SPEC).values():
        assert (gain.value, gain.low, gain.high) == (0, 0, 0)


def test_one_photo_says_nothing_about_others() -> None:
    ours = one_photo(true=50, intersection=50, predicted=50, small=2, missed=1)[None]
    theirs = one_photo(true=50, intersection=25, predicted=25, small=2, missed=2)[None]
    gains = paired_gains(ours, theirs, SPEC)
    assert set(gains) == {"miou", "failure1"}
    assert gains["miou"].value == pytest.approx(0.25)
    assert gains["failure1"].value == -0.5
    assert all((gain.low, gain.high) == ANYTHING for gain in gains.values())


def test_a_failure_that_only_one_photo_shows_has_no_narrow_interval() -> None:
    """Resamples without that photo can't measure it, and the others all say the same."""
    plain = one_photo(true=50, intersection=40, predicted=40)
    ours = np.stack([plain, plain, plain + one_photo(small=4, missed=1)])
    theirs = np.stack([plain, plain, plain + one_photo(small=4, missed=3)])
    gains = paired_gains(ours, theirs, SPEC)
    assert (gains["failure1"].value, gains["failure1"].low) == (-0.5, -1.0)
    assert gains["failure1"].high == 1.0
    assert gains["miou"].low == gains["miou"].high == 0


def test_resamples_in_which_a_failure_cannot_be_measured_are_left_out() -> None:
    plain = one_photo(true=50, intersection=40, predicted=40)
    mine = [one_photo(small=4, missed=missed) for missed in (0, 2)]
    other = [one_photo(small=4, missed=missed) for missed in (4, 4)]
    gains = paired_gains(np.stack([plain] * 4 + mine), np.stack([plain] * 4 + other), SPEC)
    assert gains["failure1"].value == -0.75
    assert (gains["failure1"].low, gains["failure1"].high) == (-1.0, -0.5)


def test_scores_are_those_that_evaluate_gives(
    make_graph: MakeGraph, run_folder: Path, val: DataSet
) -> None:
    with (
        open_runtime(make_graph()) as colour,
        open_runtime(make_graph("low.onnx", output="logits", stride=2)) as low,
        open_runtime(run_folder) as run,
    ):
        runtimes = [colour, low, run]
        accuracy, _ = measure_accuracy(runtimes, ["a", "b", "c"], val, None, [None] * 3)
        expected = [evaluate(runtime, val) for runtime in runtimes]
        masks = [[runtime.run(val.read(i)[0][None])[0] for i in range(3)] for runtime in runtimes]
    assert (accuracy.images, accuracy.split, accuracy.data) == (3, "val", str(val.root))
    assert [row.name for row in accuracy.rows] == ["a", "b", "c"]
    assert [row.scores for row in accuracy.rows] == expected
    first, *others = accuracy.rows
    assert (first.gains, first.agreement, first.checkpoint) == (None, None, None)
    for row, scores, own in zip(others, expected[1:], masks[1:], strict=True):
        assert row.gains is not None
        assert row.gains["miou"].value == scores.miou - expected[0].miou
        assert -1 < row.gains["miou"].low <= row.gains["miou"].high < 0, "the first is right"
        assert row.agreement == pytest.approx(np.mean(np.array(own) == np.array(masks[0])))
        assert row.agreement != 1


def test_the_limit_takes_the_first_photos_and_one_gives_a_report_without_nan(
    make_graph: MakeGraph, val: DataSet
) -> None:
    with (
        open_runtime(make_graph()) as colour,
        open_runtime(make_graph("low.onnx", output="logits", stride=2)) as low,
    ):
        accuracy, _ = measure_accuracy([colour, low], ["a", "b"], val, 1, [None, None])
        assert accuracy.rows[1].scores == evaluate(low, val, 1)
    text = json.dumps(accuracy.model_dump(), allow_nan=False)
    assert json.loads(text)["rows"][1]["gains"]["miou"]["high"] == 1.0


def match(
    runtime: Runtime, checkpoint: Runtime, dataset: DataSet, limit: int | None = None
) -> CheckpointMatch:
    accuracy, _ = measure_accuracy([runtime], ["a"], dataset, limit, [("runs/a", checkpoint)])
    found = accuracy.rows[0].checkpoint
    assert found is not None
    return found


def test_an_export_matches_the_run_that_it_came_from(
    run_folder: Path, exported: dict[str, Path], train: DataSet
) -> None:
    with (
        open_runtime(run_folder) as checkpoint,
        open_runtime(exported["uint8-labels"]) as export,
    ):
        found = match(export, checkpoint, train)
    assert found.passed
    assert found.checkpoint == "runs/a"
    assert found.agreement >= 0.999
    assert abs(found.miou_difference) <= 1e-4


@pytest.mark.parametrize(
    ("precision", "photos", "passed"),
    [("float32", None, False), ("int8", None, False), ("int8", 1, True)],
)
def test_a_loss_that_is_certain_fails_other_types_too(
    make_graph: MakeGraph,
    train: DataSet,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    photos: int | None,
    passed: bool,
) -> None:
    """At half the resolution borders are lost, on every photo; one photo can't tell."""
    with (
        open_runtime(make_graph()) as source,
        open_runtime(make_graph("low.onnx", output="logits", stride=2)) as low,
    ):
        monkeypatch.setattr(low, "precision", precision)
        found = match(low, source, train, photos)
        back = match(source, low, train, photos)
    assert found.miou_difference < -MATCH_LIMITS["int8"].miou
    assert found.agreement > MATCH_LIMITS["int8"].agreement
    assert found.passed == passed
    assert not back.passed, "float32 may not differ either way"


def test_the_photos_that_differ_most_come_back_with_their_masks(
    make_graph: MakeGraph, train: DataSet
) -> None:
    with (
        open_runtime(make_graph()) as colour,
        open_runtime(make_graph("low.onnx", output="logits", stride=2)) as low,
        open_runtime(make_graph("same.onnx")) as same,
    ):
        runtimes = [colour, low, same]
        accuracy, kept = measure_accuracy(runtimes, list("abc"), train, None, [None] * 3, 2)
        shares = {}
        for index, item in enumerate(train.items):
            photo = train.read(index)[0]
            first, second = (runtime.run(photo[None])[0] for runtime in (colour, low))
            shares[item.name] = float((first != second).mean())
        _, none = measure_accuracy(runtimes, list("abc"), train, None, [None] * 3, 0)
        alone, of_one = measure_accuracy([colour], ["a"], train, None, [None])
        equal, of_equal = measure_accuracy([colour, same], list("ab"), train, None, [None] * 2)
        assert [one.differs for one in kept] == sorted(shares.values(), reverse=True)[:2]
        for one in kept:
            assert one.differs == shares[one.name] > 0
            index = [item.name for item in train.items].index(one.name)
            photo, truth = train.read(index)
            np.testing.assert_array_equal(one.photo, photo)
            np.testing.assert_array_equal(one.truth, truth)
            for mask, runtime in zip(one.masks, runtimes, strict=True):
                np.testing.assert_array_equal(mask, runtime.run(photo[None])[0])
    assert accuracy.most_different == tuple(one.name for one in kept)
    assert (none, of_one, of_equal) == ([], [], [])
    assert (alone.most_different, equal.most_different) == ((), ())
    assert (equal.rows[1].agreement, equal.rows[1].checkpoint) == (1.0, None)


def test_masks_have_the_photos_own_size(
    make_graph: MakeGraph, val: DataSet, tiny_spec: Spec
) -> None:
    policy = InputPolicy(longest_side=96, smallest=(32, 32), usual=(80, 96), largest=(96, 96))
    large = make_graph("large.onnx", spec=tiny_spec.model_copy(update={"input": policy}))
    with open_runtime(make_graph()) as colour, open_runtime(large) as other:
        accuracy, kept = measure_accuracy([colour, other], list("ab"), val, None, [None] * 2)
        assert accuracy.rows[1].scores == evaluate(other, val)
    assert kept
    assert {mask.shape for one in kept for mask in one.masks} == {val.read(0)[1].shape}


def test_what_cannot_be_used_is_named(make_graph: MakeGraph, val: DataSet) -> None:
    two = Spec(classes=("cat", "dog"), palette=((0, 0, 0), (9, 9, 9)))
    with (
        open_runtime(make_graph()) as colour,
        open_runtime(make_graph("fixed.onnx", size=(1, 64, 64))) as fixed,
        open_runtime(make_graph("two.onnx", spec=two)) as other,
    ):
        with pytest.raises(UserError, match=r"val_00\.png: .*fixed\.onnx takes"):
            measure_accuracy([colour, fixed], list("ab"), val, None, [None] * 2)
        with pytest.raises(UserError, match=r"two\.onnx has 2 classes"):
            measure_accuracy([colour], ["a"], val, None, [("other", other)])


def test_another_networks_export_does_not_match(
    run_folder: Path, make_graph: MakeGraph, train: DataSet
) -> None:
    with open_runtime(run_folder) as run, open_runtime(make_graph()) as other:
        found = match(other, run, train)
        back = match(run, other, train)
    assert not found.passed
    assert not back.passed
    assert found.miou_difference == -back.miou_difference > 0


def test_a_checkpoint_of_several_exports_runs_each_photo_once(
    make_graph: MakeGraph, val: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        open_runtime(make_graph()) as source,
        open_runtime(make_graph("a.onnx")) as a,
        open_runtime(make_graph("b.onnx")) as b,
    ):
        runs = []
        whole = source.run

        def counted(images: Pixels) -> Pixels:
            runs.append(images)
            return whole(images)

        monkeypatch.setattr(source, "run", counted)
        checkpoints = [None, ("s", source), ("s", source)]
        accuracy, _ = measure_accuracy([source, a, b], list("sab"), val, None, checkpoints)
    assert len(runs) == 3
    assert [row.checkpoint is not None and row.checkpoint.passed for row in accuracy.rows] == [
        False,
        True,
        True,
    ]


@pytest.mark.parametrize(
    ("precision", "name"),
    [
        ("float32", "float32"),
        ("float16", "float16"),
        ("float32 (stored as float16)", "float16"),
        ("bfloat16+float32 (stored as float32)", "bfloat16"),
        ("float32+int8", "int8"),
        ("float32 (TF32 allowed)", "tf32"),
        ("float64", "float32"),
    ],
)
def test_the_widest_limits_of_the_types_named_hold(precision: str, name: str) -> None:
    assert limits_for(precision) == MATCH_LIMITS[name]


def test_limits_are_those_that_exports_are_certified_with() -> None:
    named = {"tf32": "tf32", "float16": "fp16", "bfloat16": "bf16", "int8": "int8"}
    certified = {long: LIMITS[short] for long, short in named.items()}  # type: ignore[index]
    ours = {name: (one.agreement, one.miou) for name, one in MATCH_LIMITS.items()}
    assert ours.pop("float32") == (COMPARING_FP32.agreement, LIMITS["fp32"].miou_loss)
    assert ours == {name: (one.agreement, one.miou_loss) for name, one in certified.items()}
