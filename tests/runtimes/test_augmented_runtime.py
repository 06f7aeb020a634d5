"""Test-time augmentation against the same in plain float64."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from srdeploy.errors import UserError
from srdeploy.imaging import Pixels
from srdeploy.runtimes.registry import open_runtime
from srdeploy.runtimes.views import AugmentedRuntime, TiledRuntime
from srdeploy.serve.folders.rendering import with_views
from srdeploy.serve.folders.settings import PredictSettings

MakeGraph = Callable[..., Path]


def images_of(count: int, height: int, width: int) -> Pixels:
    """Noise with little contrast: probabilities are not all 0 or 1."""
    shape = (count, height, width, 3)
    return np.random.default_rng(0).integers(100, 104, shape, dtype=np.uint8)


def resized(plane: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, as Pillow does."""
    return np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR))


def expected_mean(graph: Path, image: Pixels, scales: list[float], flip: bool) -> np.ndarray:
    """Mean probabilities float64 [K, H, W] of one image, view by view."""
    height, width = image.shape[:2]
    found = []
    with open_runtime(graph) as runtime:
        for scale in scales:
            view = resized(image, round(height * scale), round(width * scale))
            for mirrored in [False, True] if flip else [False]:
                seen = np.ascontiguousarray(view[:, ::-1] if mirrored else view)
                logits = runtime.logits(seen[None])[0]
                back = logits[:, :, ::-1] if mirrored else logits
                planes = [resized(np.ascontiguousarray(one), height, width) for one in back]
                powers = np.exp(np.array(planes, np.float64))
                found.append(powers / powers.sum(0))
    mean: np.ndarray = np.mean(found, axis=0)
    return mean


@pytest.mark.parametrize(
    ("scales", "flip"), [([1.0], True), ([0.75, 1.0, 1.5], False), ([0.8, 1.25], True)]
)
def test_probabilities_are_averaged_over_the_views(
    make_graph: MakeGraph, scales: list[float], flip: bool
) -> None:
    images, graph = images_of(2, 64, 56), make_graph(output="both")
    with AugmentedRuntime(open_runtime(graph), scales, flip) as runtime:
        logits, labels = runtime.logits(images), runtime.run(images)
    for image, own, label in zip(images, logits, labels, strict=True):
        mean = expected_mean(graph, image, scales, flip)
        np.testing.assert_allclose(np.exp(own.astype(np.float64)), mean, atol=1e-5)
        ordered = np.sort(mean, axis=0)
        sure = ordered[-1] - ordered[-2] > 1e-4
        assert sure.mean() > 0.5
        assert (label == mean.argmax(0))[sure].all()


def test_scale_1_alone_is_exactly_the_inner_runtime(make_graph: MakeGraph) -> None:
    images, inner = images_of(2, 40, 48), open_runtime(make_graph(output="both"))
    with AugmentedRuntime(inner, [1.0], False) as runtime:
        assert np.array_equal(runtime.logits(images), inner.logits(images))
        assert np.array_equal(runtime.run(images), inner.run(images))


def test_small_scales_stay_as_large_as_the_network_needs(make_graph: MakeGraph) -> None:
    images = images_of(1, 40, 40)
    with AugmentedRuntime(open_runtime(make_graph(output="both")), [0.25], False) as runtime:
        assert runtime.run(images).shape == (1, 40, 40)


def test_graphs_that_can_not_be_averaged_are_refused(make_graph: MakeGraph) -> None:
    with pytest.raises(UserError, match="--output both"):
        AugmentedRuntime(open_runtime(make_graph()), [1.0], True)
    fixed = open_runtime(make_graph("fixed.onnx", output="both", size=(1, 40, 48)))
    with pytest.raises(UserError, match="leave --scales away"):
        AugmentedRuntime(fixed, [1.0, 2.0], False)
    with AugmentedRuntime(fixed, [1.0], True) as runtime:
        assert runtime.run(images_of(1, 40, 48)).shape == (1, 40, 48)


def test_views_are_put_around_a_runtime_only_where_they_are_asked_for(
    make_graph: MakeGraph,
) -> None:
    runtime = open_runtime(make_graph(output="both"))
    assert with_views(runtime, PredictSettings(), 1) is runtime
    assert isinstance(with_views(runtime, PredictSettings(flip=True), 1), AugmentedRuntime)
    both = with_views(runtime, PredictSettings(scales=(0.5, 1), tile=(64, 64)), 1)
    assert isinstance(both, TiledRuntime)
    assert isinstance(both.inner, AugmentedRuntime)


def test_augmented_tiles_equal_the_augmented_whole_away_from_their_edges(
    exported: dict[str, Path],
) -> None:
    """Mirroring needs tiles whose width the network's strides divide."""
    images = images_of(1, 64, 64)
    inner = AugmentedRuntime(open_runtime(exported["uint8-both"]), [1.0], True)
    with inner:
        expected = inner.logits(images)
    with TiledRuntime(inner, (64, 64), 32) as tiled:
        np.testing.assert_allclose(tiled.logits(images), expected, atol=1e-5)
