"""A converted graph is compared with its float32 reference on photos, and judged by precision."""

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from srdeploy.artifacts.artifact import EngineSidecar, Profile, write_sidecar
from srdeploy.errors import UserError
from srdeploy.export import differences, verify
from srdeploy.export.certificate import Line
from srdeploy.export.comparison import COMPARING_FP32, LIMITS
from srdeploy.export.differences import EMULATED, MaskScores
from srdeploy.export.precision.half import to_half
from srdeploy.export.verify import verification_line
from srdeploy.files import sha256_of
from srdeploy.graph.signature import read_signature
from srdeploy.imaging import Pixels, restore
from srdeploy.metrics import Score
from srdeploy.precision import PRECISIONS, HalfPrecision, Precision
from srdeploy.runtimes.base import Runtime
from srdeploy.runtimes.registry import open_runtime
from srdeploy.spec import Spec

Change = Callable[[npt.NDArray[np.float32]], Any]
HEAD = "network/head/Conv"


def edited(source: Path, target: Path, initialiser: str, change: Change) -> Path:
    model = onnx.load(str(source))
    tensor = next(t for t in model.graph.initializer if t.name == initialiser)
    array = np.asarray(change(numpy_helper.to_array(tensor)), np.float32)
    tensor.CopyFrom(numpy_helper.from_array(array, initialiser))
    onnx.save(model, str(target))
    return target


def at_usual_size(photo: Pixels) -> Pixels:
    """The photo at the spec's usual size, 48 x 64, as a batch."""
    return np.array(Image.fromarray(photo).resize((64, 48)))[None]


@pytest.fixture(scope="module")
def shifted(tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class 0 is preferred: most labels change."""
    path = tmp_path_factory.mktemp("shifted") / "model.onnx"
    return edited(tiny_file, path, "network.head.bias", lambda bias: bias + [3.0, 0, 0])


@pytest.fixture(scope="module")
def nearly(tiny_file: Path, photos: list[Pixels], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1 to 2.5 % of the labels at the usual size differ."""
    path = tmp_path_factory.mktemp("nearly") / "model.onnx"
    images = np.concatenate([at_usual_size(photo) for photo in photos])
    with open_runtime(tiny_file) as runtime:
        expected = runtime.run(images)
    low, high = 0.0, 3.0
    for _ in range(20):
        shift = np.array([(low + high) / 2, 0, 0])
        edited(tiny_file, path, "network.head.bias", shift.__add__)
        with open_runtime(path) as runtime:
            share = float((runtime.run(images) != expected).mean())
        if 0.01 < share < 0.025:
            return path
        low, high = (shift[0], high) if share <= 0.01 else (low, shift[0])
    raise AssertionError("no shift moves so few labels")


@pytest.mark.parametrize("precision", ["fp32", "tf32", "int8"])
def test_a_candidate_that_is_the_reference_passes_without_any_difference(
    precision: Precision, spec: Spec, tiny_file: Path, photos: list[Pixels]
) -> None:
    line = verification_line(tiny_file, tiny_file, spec, photos, precision)
    assert line.passed, line
    assert line.name == "verification"
    (run,) = line.figures["runs"]
    assert run["agreement"] == run["agreement_that_would_have_passed"] == 1.0
    assert run["tolerance_that_would_have_passed"] == 0.0
    assert run["largest_iou_difference"] == 0.0
    shapes = {tuple(case["shape"]) for case in run["cases"]}
    assert {(1, 48, 64), (1, 32, 32), (1, 64, 80), (3, 32, 32), (2, 48, 64)} == shapes
    assert f"{precision} labels agree on 100.00 % of pixels" in line.detail


def test_the_figures_are_those_of_an_independent_computation(
    spec: Spec, tiny_file: Path, shifted: Path, photos: list[Pixels]
) -> None:
    line = verification_line(tiny_file, shifted, spec, photos, "int8")
    assert line.passed is False
    (run,) = line.figures["runs"]
    images = np.concatenate([at_usual_size(photo) for photo in photos])
    with open_runtime(tiny_file) as one, open_runtime(shifted) as other:
        a, b = one.run(images), other.run(images)
    assert run["agreement"] == pytest.approx(float((a == b).mean()))
    for index, name in enumerate(spec.classes):
        left, right = set(np.flatnonzero(a == index)), set(np.flatnonzero(b == index))
        iou = len(left & right) / len(left | right) if left | right else None
        assert run["iou_of_the_two_predictions"][name] == pytest.approx(iou)
    for index in range(len(photos)):
        assert run["cases"][index]["agreement"] == float((a[index] == b[index]).mean())
        assert run["cases"][index]["largest_difference"] == pytest.approx(3.0, rel=1e-4)
        scale = run["cases"][index]["largest_logit"]
        assert 3 / scale <= run["tolerance_that_would_have_passed"] * 1.0001


def test_a_broken_weight_fails_and_the_first_node_named_is_its_own(
    tmp_path: Path, spec: Spec, tiny_file: Path, photos: list[Pixels]
) -> None:
    broken = edited(tiny_file, tmp_path / "b.onnx", "network.body.0.weight", lambda w: w[::-1])
    line = verification_line(tiny_file, broken, spec, photos, "int8")
    assert line.passed is False
    assert "the difference begins at node 'network/body/0/Conv' (Conv)" in line.detail
    assert line.detail.endswith("keep it in float32 with --keep 'network/body/0/Conv'")
    named = [one["node"] for one in line.figures["layers"] if one["error"]]
    assert named[0] == "network/body/0/Conv"
    line = verification_line(tiny_file, broken, spec, photos, "fp32")
    assert line.detail.endswith("after it")  # nothing was converted: no flag would help


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_nan_is_named_with_the_sizes_and_the_node(
    precision: Precision, tmp_path: Path, spec: Spec, tiny_file: Path, photos: list[Pixels]
) -> None:
    broken = edited(tiny_file, tmp_path / "nan.onnx", "network.body.0.bias", lambda b: b * np.nan)
    line = verification_line(tiny_file, broken, spec, photos, precision)
    assert line.passed is False
    assert f"NaN or infinity in the logits of {precision} at largest; smallest" in line.detail
    assert "first NaN or infinity comes from node 'network/body/0/Conv'" in line.detail
    assert line.figures["runs"][0]["finite"] is False
    json.dumps(line.figures, allow_nan=False)


@pytest.mark.parametrize(
    ("precision", "passes"), [("fp32", False), ("tf32", False), ("bf16", False), ("int8", True)]
)
def test_each_precision_has_its_own_limits(
    precision: Precision,
    passes: bool,
    spec: Spec,
    tiny_file: Path,
    nearly: Path,
    photos: list[Pixels],
) -> None:
    line = verification_line(tiny_file, nearly, spec, photos, precision)
    assert line.passed is passes, line.detail
    assert line.figures["limits"]["agreement"] == LIMITS[precision].agreement
    assert 0.975 < line.figures["runs"][0]["agreement_that_would_have_passed"] < 0.99


def test_limits_loosen_with_fewer_bits_and_each_has_its_reason() -> None:
    order = [LIMITS[name] for name in ("fp32", "fp16", "bf16", "int8")]
    for tighter, looser in pairwise(order):
        assert tighter.agreement >= looser.agreement
        assert tighter.least >= looser.least
        assert tighter.rounding < looser.rounding
    assert all(len(LIMITS[name].reason) > 20 for name in PRECISIONS)
    assert all(one.agreement > one.least or one.agreement == 1 for one in LIMITS.values())


def test_a_graph_that_compares_features_is_not_held_to_parts_of_a_million(
    spec: Spec,
    tiny_file: Path,
    shifted: Path,
    photos: list[Pixels],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(verify, "compares_features", lambda model: True)
    line = verification_line(tiny_file, tiny_file, spec, photos, "fp32")
    assert line.figures["limits"]["least"] == COMPARING_FP32.least
    assert verification_line(tiny_file, shifted, spec, photos, "fp32").passed is False


def converted(source: Path, target: Path, precision: HalfPrecision, keep: list[str]) -> Path:
    onnx.save(to_half(onnx.load(str(source)), precision, keep), str(target))
    return target


def test_16_bit_graphs_are_judged_with_every_rounding_emulated_and_fp16_also_as_it_runs(
    tmp_path: Path, spec: Spec, tiny_file: Path, photos: list[Pixels]
) -> None:
    ways: dict[HalfPrecision, list[str]] = {
        "fp16": [EMULATED, "onnxruntime, cpu, float32 (stored as float16)"],
        "bf16": [EMULATED],
    }
    needed = []
    for precision, expected in ways.items():
        half = converted(tiny_file, tmp_path / f"{precision}.onnx", precision, [])
        line = verification_line(tiny_file, half, spec, photos, precision)
        assert [run["computed_by"] for run in line.figures["runs"]] == expected
        needed.append(line.figures["runs"][0]["tolerance_that_would_have_passed"])
        assert line.passed is (line.figures["runs"][0]["agreement"] >= 0.995)
    assert 1e-5 < needed[0] < needed[1] / 3 < 1e-2  # fp16 has three bits of mantissa more


def test_another_runtime_is_judged_in_its_own_arithmetic(
    spec: Spec, tiny_file: Path, photos: list[Pixels]
) -> None:
    pytest.importorskip("openvino")
    line = verification_line(tiny_file, tiny_file, spec, photos, "fp32", runtime="openvino")
    assert line.passed, line.detail
    (run,) = line.figures["runs"]
    assert run["computed_by"] == "openvino, cpu, float32"
    assert 0 < run["tolerance_that_would_have_passed"] < 1e-4


def test_a_layer_beyond_fp16s_range_is_found_and_the_flags_given_mend_it(
    tmp_path: Path, spec: Spec, tiny_file: Path, photos: list[Pixels]
) -> None:
    large = edited(tiny_file, tmp_path / "l.onnx", "network.stem.0.weight", lambda w: w * 100)
    large = edited(large, large, "network.body.0.weight", lambda w: w * 1e4)
    half = converted(large, tmp_path / "half.onnx", "fp16", [])
    line = verification_line(large, half, spec, photos, "fp16")
    assert line.passed is False
    assert "NaN or infinity in the logits of fp16" in line.detail
    assert (
        "comes from node 'network/body/0/Conv' (Conv), where the reference reaches" in line.detail
    )
    assert "(fp16 ends at 65504)" in line.detail
    keep = re.findall("--keep '([^']+)'", line.detail)
    assert keep[0] == "network/body/0/Conv"
    mended = converted(large, tmp_path / "mended.onnx", "fp16", keep)
    assert verification_line(large, mended, spec, photos, "fp16").passed


def test_pictures_of_several_sizes_and_a_lone_one_are_taken(
    spec: Spec, tiny_file: Path, photos: list[Pixels]
) -> None:
    mixed = [photos[0], photos[1][:50, :33], np.ascontiguousarray(photos[0][::2])]
    (run,) = verification_line(tiny_file, tiny_file, spec, mixed, "fp32").figures["runs"]
    assert [tuple(case["shape"]) for case in run["cases"][:3]] == [(1, 48, 64)] * 3
    (run,) = verification_line(tiny_file, tiny_file, spec, mixed[:1], "fp32").figures["runs"]
    assert max(case["shape"][0] for case in run["cases"]) == 2  # a batch, by mirroring it


def test_synthetic_pictures_are_said(spec: Spec, tiny_file: Path, photos: list[Pixels]) -> None:
    line = verification_line(tiny_file, tiny_file, spec, photos, "int8", synthetic=True)
    assert line.detail.endswith("on synthetic images, not photos: give --images")
    assert line.figures["drawn"] is True
    assert "drawn" not in verification_line(tiny_file, tiny_file, spec, photos, "int8").figures


def masks_of(file: Path, photos: list[Pixels]) -> list[Pixels]:
    """What a graph says, at the photos' own size: as if it were true."""
    with open_runtime(file) as runtime:
        return [restore(runtime.run(at_usual_size(p))[0], *p.shape[:2]) for p in photos]


def test_against_masks_miou_is_that_of_the_scoring_and_a_loss_fails(
    spec: Spec, tiny_file: Path, nearly: Path, photos: list[Pixels]
) -> None:
    masks = masks_of(tiny_file, photos)
    line = verification_line(tiny_file, nearly, spec, photos, "int8", masks=masks)
    score = Score(spec)
    for mask, found in zip(masks, masks_of(nearly, photos), strict=True):
        score.update(mask, found)
    against = line.figures["runs"][0]["against_masks"]
    assert against["miou_reference"] == 1.0
    assert against["miou_candidate"] == pytest.approx(score.result().miou)
    assert against["miou_difference"] == pytest.approx(score.result().miou - 1)
    for name, iou in score.result().iou.items():
        assert against["iou_per_class"][name][1] == iou
    assert "mIoU" in line.detail
    beyond = 1 - score.result().miou - 2 * against["standard_error"] > LIMITS["int8"].miou_loss
    assert line.passed is not beyond
    # The other way round the candidate gains, which no limit is for.
    masks = masks_of(nearly, photos)
    assert verification_line(tiny_file, nearly, spec, photos, "int8", masks=masks).passed


def test_the_standard_error_leaves_each_photo_out_in_turn(
    spec: Spec, tiny_file: Path, nearly: Path, photos: list[Pixels]
) -> None:
    three = [*photos, np.ascontiguousarray(photos[0][::-1])]
    masks = masks_of(tiny_file, three)
    found = masks_of(nearly, three)
    line = verification_line(tiny_file, nearly, spec, three, "int8", masks=masks)
    losses = []
    for out in range(3):
        score = Score(spec)
        for index in {0, 1, 2} - {out}:
            score.update(masks[index], found[index])
        losses.append(1 - score.result().miou)
    mean = sum(losses) / 3
    error = (2 / 3 * sum((loss - mean) ** 2 for loss in losses)) ** 0.5
    assert line.figures["runs"][0]["against_masks"]["standard_error"] == pytest.approx(error)
    single = verification_line(tiny_file, nearly, spec, three[:1], "int8", masks=masks[:1])
    assert single.figures["runs"][0]["against_masks"]["standard_error"] is None


@pytest.mark.parametrize(
    ("gain", "error", "exceeds"),
    [
        (-0.004, 0.0, False),
        (0.1, None, False),
        (-0.02, 0.005, True),
        (-0.02, 0.01, None),  # within two standard errors: too few photos to say
        (-0.02, None, None),
    ],
)
def test_a_loss_counts_beyond_two_standard_errors(
    gain: float, error: float | None, exceeds: bool | None
) -> None:
    assert MaskScores(0.5, 0.5 + gain, {}, error).exceeds(0.005) is exceeds


@pytest.fixture
def engine(tmp_path: Path, spec: Spec, tiny_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An engine's file and sidecar; its plan is run by onnxruntime, from nearly the same graph."""
    graph = edited(tiny_file, tmp_path / "e.onnx", "network.body.0.weight", lambda w: w[::-1])
    path = tmp_path / "model.sm89.engine"
    path.write_bytes(b"plan")
    profile = Profile(smallest=(1, 40, 48), usual=(1, 48, 64), largest=(2, 56, 64))
    sidecar = EngineSidecar(
        builder="tensorrt",
        builder_version="11.4",
        compute_capabilities=("8.9",),
        gpu=None,
        cuda_driver=None,
        precision="int8",
        layer_types={"int8": 2},
        read_from="network",
        profiles=(profile,),
        engine_sha256=sha256_of(path),
        engine_bytes=4,
        onnx="model.onnx",
        onnx_sha256=sha256_of(graph),
        command="srdeploy export",
        spec=spec,
        signature=read_signature(tiny_file),
    )
    write_sidecar(path, sidecar)

    def opened(file: Path, device: str = "cpu", *rest: Any, **options: Any) -> Runtime:
        if Path(file) != path:
            return open_runtime(file, device, *rest, **options)
        assert device == "cuda"
        return open_runtime(graph, spec=spec)

    monkeypatch.setattr(differences, "open_runtime", opened)
    return path


def test_an_engine_gives_labels_alone_at_its_profiles_sizes(
    engine: Path, spec: Spec, tiny_file: Path, photos: list[Pixels]
) -> None:
    line = verification_line(tiny_file, engine, spec, photos, "int8")
    assert line.passed is False
    assert "only labels, so logits and NaN were not looked at" in line.detail
    assert "model.onnx, which it was built from, is not beside it" in line.detail
    (run,) = line.figures["runs"]
    assert (run["finite"], run["tolerance_that_would_have_passed"]) == (None, None)
    shapes = {tuple(case["shape"]) for case in run["cases"]}
    assert shapes == {(1, 48, 64), (1, 40, 48), (1, 56, 64), (2, 40, 48), (2, 48, 64)}


def test_an_engines_layers_are_those_of_the_graph_beside_it(
    engine: Path, spec: Spec, tiny_file: Path, photos: list[Pixels]
) -> None:
    graph = engine.with_name("model.onnx")
    edited(tiny_file, graph, "network.body.0.weight", lambda w: w[::-1])
    line = verification_line(tiny_file, engine, spec, photos, "int8")
    assert "begins at node 'network/body/0/Conv'" in line.detail


def test_a_deploy_folder_stands_for_its_graph(
    tmp_path: Path, spec: Spec, tiny_file: Path, photos: list[Pixels]
) -> None:
    for name in ("plain", "typed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.onnx").write_bytes(tiny_file.read_bytes())
    line = verification_line(tmp_path / "plain", tmp_path / "typed", spec, photos, "fp32")
    assert line.passed
    assert line.figures["candidate"] == "model.onnx"


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as told:
        verification_line(*arguments, **options)
    assert "\n" not in str(told.value)
    return str(told.value)


def test_what_does_not_belong_together_is_refused_in_one_line(
    tmp_path: Path,
    spec: Spec,
    tiny_file: Path,
    photos: list[Pixels],
    make_run: Callable[[Path], Path],
) -> None:
    other = spec.model_copy(update={"classes": ("sky", "road", "lawn")})
    assert "export both from one run" in refused(tiny_file, tiny_file, other, photos, "int8")
    assert "give a folder with --images" in refused(tiny_file, tiny_file, spec, [], "int8")
    masks = [np.zeros((60, 70), np.uint8)]
    text = refused(tiny_file, tiny_file, spec, photos, "int8", masks=masks)
    assert "1 masks for 2 pictures" in text
    small = [np.zeros((60, 7), np.uint8)] * 2
    text = refused(tiny_file, tiny_file, spec, photos, "int8", masks=small)
    assert "a mask of 60x7 for a picture of 60x70" in text
    run = make_run(tmp_path / "run")
    assert "is a run folder" in refused(tiny_file, run, spec, photos, "int8")
    absent = tmp_path / "absent.onnx"
    assert "no such file" in refused(tiny_file, absent, spec, photos, "int8")
    assert "no such file" in refused(absent, tiny_file, spec, photos, "int8")
    text = refused(tiny_file, tiny_file, spec, photos, "int8", runtime="onnxrt")
    assert "unknown runtime 'onnxrt'" in text


def test_the_line_goes_into_a_certificate_as_it_is(
    spec: Spec, tiny_file: Path, shifted: Path, photos: list[Pixels]
) -> None:
    line = verification_line(tiny_file, shifted, spec, photos, "int8")
    assert Line.model_validate(line.model_dump()) == line
    assert "\n" not in line.detail
    assert HEAD in line.detail
