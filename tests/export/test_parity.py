"""Torch and the exported file are compared on photos, and a difference is seen."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from srdeploy.deployable import Deployable
from srdeploy.errors import UserError
from srdeploy.export.comparison import TOLERANCE, expose_logits
from srdeploy.export.parity import parity_line
from srdeploy.export.source import parity_images
from srdeploy.export.to_onnx import export_onnx
from srdeploy.imaging import Pixels
from srdeploy.runs import open_run
from srdeploy.runtimes.registry import open_runtime
from srdeploy.spec import Spec

Randomise = Callable[..., nn.Module]


def edited(source: Path, target: Path, initialiser: str, change: Callable[..., object]) -> Path:
    model = onnx.load(str(source))
    tensor = next(t for t in model.graph.initializer if t.name == initialiser)
    array = np.asarray(change(onnx.numpy_helper.to_array(tensor)), np.float32)
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, initialiser))
    onnx.save(model, str(target))
    return target


def test_an_exported_network_passes_at_every_promised_size_and_in_batches(
    spec: Spec, tiny: type[nn.Module], randomised: Randomise, tiny_file: Path, photos: list[Pixels]
) -> None:
    line = parity_line(randomised(tiny(), 1), spec, tiny_file, photos)
    assert line.passed, line
    shapes = {tuple(case["shape"]) for case in line.figures["cases"]}
    assert {(1, 48, 64), (1, 32, 32), (1, 64, 80), (3, 32, 32), (2, 48, 64)} == shapes
    assert line.figures["tolerance_that_would_have_passed"] < TOLERANCE
    assert line.figures["graph_compares_features"] is False
    seen = [value for value in line.figures["iou_of_the_two_predictions"].values() if value]
    assert min(seen) > 0.999


def test_a_changed_weight_fails_with_the_tolerance_that_would_have_passed(
    tmp_path: Path,
    spec: Spec,
    tiny: type[nn.Module],
    randomised: Randomise,
    tiny_file: Path,
    photos: list[Pixels],
) -> None:
    changed = tmp_path / "changed.onnx"
    edited(tiny_file, changed, "network.head.bias", lambda bias: bias + [0.5, 0, 0])
    network = randomised(tiny(), 1)
    line = parity_line(network, spec, changed, photos)
    assert line.passed is False
    with torch.inference_mode():
        module = Deployable(network, spec, output="logits").eval()
        photo = at_usual_size(photos[0])
        scale = float(module(torch.from_numpy(photo[None])).abs().max())
    assert line.figures["cases"][0]["largest_difference"] == pytest.approx(0.5, rel=1e-3)
    assert line.figures["cases"][0]["largest_logit"] == pytest.approx(scale, rel=1e-3)
    assert line.figures["tolerance_that_would_have_passed"] >= 0.5 / scale * 0.999


def at_usual_size(photo: Pixels) -> Pixels:
    """The photo at the spec's usual size, 48 x 64."""
    return np.array(Image.fromarray(photo).resize((64, 48)))


def test_nan_on_either_side_fails_and_is_said(
    tmp_path: Path,
    spec: Spec,
    tiny: type[nn.Module],
    randomised: Randomise,
    tiny_file: Path,
    photos: list[Pixels],
) -> None:
    broken = tmp_path / "nan.onnx"
    edited(tiny_file, broken, "network.head.bias", lambda bias: bias * np.nan)
    line = parity_line(randomised(tiny(), 1), spec, broken, photos)
    assert line.passed is False
    assert line.detail.startswith("NaN or infinity in the logits at")
    diverged = randomised(tiny(), 1)
    torch.nn.init.constant_(diverged.get_parameter("head.bias"), torch.nan)
    assert parity_line(diverged, spec, tiny_file, photos).passed is False


def test_labels_may_differ_only_where_the_two_best_classes_are_nearly_tied(
    tmp_path: Path,
    spec: Spec,
    tiny: type[nn.Module],
    randomised: Randomise,
    tiny_file: Path,
    photos: list[Pixels],
) -> None:
    """Classes are swapped behind the ArgMax: the logits agree, the labels do not."""
    model = onnx.load(str(tiny_file))
    index, argmax = next((i, n) for i, n in enumerate(model.graph.node) if n.op_type == "ArgMax")
    result, argmax.output[0] = argmax.output[0], "class"
    for name, value in (("one", 1), ("three", 3)):
        array = np.array(value, np.int64)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    make = onnx.helper.make_node
    model.graph.node.insert(index + 1, make("Add", ["class", "one"], ["next"]))
    model.graph.node.insert(index + 2, make("Mod", ["next", "three"], [result]))
    onnx.save(model, str(tmp_path / "swapped.onnx"))
    line = parity_line(randomised(tiny(), 1), spec, tmp_path / "swapped.onnx", photos)
    assert line.passed is False
    assert line.figures["cases"][0]["beyond"] == 0
    assert line.figures["cases"][0]["unexplained"] > 0.5


class OtherAtTheSmallest(nn.Module):
    """As if the exporter had frozen something that follows from the image's size."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits.flip(1) if images.shape[2] == 32 else logits


def test_a_graph_that_is_wrong_at_some_sizes_alone_says_which_and_what_to_do(
    spec: Spec, tiny: type[nn.Module], randomised: Randomise, tiny_file: Path, photos: list[Pixels]
) -> None:
    line = parity_line(OtherAtTheSmallest(randomised(tiny(), 1)), spec, tiny_file, photos)
    assert line.passed is False
    assert "right at 48x64, 64x80, wrong at 32x32" in line.detail
    assert "--size HxW --set fixed_size=true" in line.detail
    line = parity_line(randomised(tiny(), 2), spec, tiny_file, photos)
    assert line.passed is False
    assert "fixed_size" not in line.detail  # wrong at every size: another matter


def test_a_graph_that_fails_at_a_size_names_size_node_and_remedy_but_no_temporary_file(
    tmp_path: Path,
    spec: Spec,
    tiny: type[nn.Module],
    randomised: Randomise,
    tiny_file: Path,
    photos: list[Pixels],
) -> None:
    model = onnx.load(str(tiny_file))
    index, argmax = next((i, n) for i, n in enumerate(model.graph.node) if n.op_type == "ArgMax")
    fixed = onnx.numpy_helper.from_array(np.zeros((1, 3, 48, 64), np.float32), "fixed")
    model.graph.initializer.append(fixed)
    add = onnx.helper.make_node("Add", [argmax.input[0], "fixed"], ["sum"], name="network/pool")
    argmax.input[0] = "sum"
    model.graph.node.insert(index, add)
    broken = tmp_path / "broken.onnx"
    onnx.save(model, str(broken))
    with pytest.raises(UserError, match="on images of 32x32.*Add node 'network/pool'") as caught:
        parity_line(randomised(tiny(), 1), spec, broken, photos)
    assert "--size HxW --set fixed_size=true" in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


class Choosing(nn.Module):
    """Takes one of two features per pixel, whichever is larger: nearly tied, rounding decides."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 2, 3, padding=1)
        self.head = nn.Conv2d(2, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        first, second = self.features(images).split(1, dim=1)
        logits: Tensor = self.head(torch.where(first > second, first, -second).repeat(1, 2, 1, 1))
        return logits


def test_a_network_that_compares_its_features_is_allowed_what_nudging_its_input_does(
    tmp_path: Path, spec: Spec, randomised: Randomise, photos: list[Pixels]
) -> None:
    network = randomised(Choosing(), 1)
    path = tmp_path / "m.onnx"
    export_onnx(Deployable(network, spec), spec, path)
    line = parity_line(network, spec, path, photos)
    assert line.figures["graph_compares_features"] is True
    assert line.passed, line
    torch.nn.init.constant_(network.get_parameter("features.bias"), 0.3)
    assert parity_line(network, spec, path, photos).passed is False


def test_the_exposed_logits_are_those_the_labels_are_taken_from(
    tmp_path: Path, tiny_file: Path, photos: list[Pixels]
) -> None:
    copy = expose_logits(onnx.load(str(tiny_file)), tiny_file)
    onnx.save(copy, str(tmp_path / "exposed.onnx"))
    images = np.stack(photos)
    with open_runtime(tiny_file) as plain, open_runtime(tmp_path / "exposed.onnx") as exposed:
        labels = plain.run(images)
        logits = exposed.logits(images)
        np.testing.assert_array_equal(logits.argmax(1), labels)
        np.testing.assert_array_equal(exposed.run(images), labels)


def test_photos_come_from_the_run_or_a_folder_and_their_absence_is_explained(
    tmp_path: Path, make_run: Callable[[Path], Path]
) -> None:
    run = open_run(make_run(tmp_path / "run"))
    assert [photo.shape for photo in parity_images(run, None)] == [(60, 70, 3)] * 2
    assert len(parity_images(run, run.folder / "samples")) == 2
    with pytest.raises(UserError, match="no such folder of photos"):
        parity_images(run, tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no photos"):
        parity_images(run, tmp_path / "empty")
    for sample in run.samples:
        sample.unlink()
    with pytest.raises(UserError, match="give a folder of photos with --images"):
        parity_images(run, None)
