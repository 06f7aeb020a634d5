"""Tiles: where they lie, how they are blended, and that they give what the whole image gives."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from srdeploy.errors import UserError
from srdeploy.imaging import Pixels, fit
from srdeploy.serve.runtime import Runtime, open_runtime
from srdeploy.serve.tiled_runtime import TiledRuntime
from srdeploy.serve.tiling import blending, cuts, spans
from srdeploy.spec import Spec

MakeGraph = Callable[..., Path]
REACH = 7
"""Pixels that the network below sees around each, at most: 2 by the first convolution, 2 by the
second at half size, 2 and 1 by the resizing."""


def images_of(count: int, height: int, width: int, seed: int = 0) -> Pixels:
    """Noise."""
    shape = (count, height, width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def looking(tmp_path_factory: pytest.TempPathFactory, tiny_spec: Spec) -> Callable[..., Path]:
    """Writes a network that looks around each pixel: two convolutions, one of stride 2, and a
    bilinear resize to the image's size."""

    def write(output: str = "both", size: tuple[Any, Any] = ("H", "W")) -> Path:
        rng = np.random.default_rng(0)
        weights = {
            "first": rng.normal(0, 0.01, (4, 3, 5, 5)),
            "second": rng.normal(0, 0.3, (3, 4, 3, 3)),
        }
        tensors = [
            numpy_helper.from_array(array.astype(np.float32), name)
            for name, array in weights.items()
        ]
        tensors.append(numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "factors"))
        tensors.append(numpy_helper.from_array(np.array([0, 0], np.int64), "zeros"))
        tensors.append(numpy_helper.from_array(np.array([2, 3], np.int64), "axes"))
        nodes = [
            helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Transpose", ["floats"], ["planes"], perm=[0, 3, 1, 2]),
            helper.make_node("Conv", ["planes", "first"], ["a"], pads=[2] * 4, strides=[2, 2]),
            helper.make_node("Relu", ["a"], ["b"]),
            helper.make_node("Conv", ["b", "second"], ["c"], pads=[1] * 4),
            helper.make_node("Resize", ["c", "", "factors"], ["d"], mode="linear"),
            # Odd images: the resized map has one row or column too many.
            helper.make_node("Shape", ["planes"], ["size"], start=2, end=4),
            helper.make_node("Slice", ["d", "zeros", "size", "axes"], ["logits"]),
            helper.make_node("ArgMax", ["logits"], ["best"], axis=1, keepdims=0),
            helper.make_node("Cast", ["best"], ["labels"], to=TensorProto.UINT8),
        ]
        images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", *size, 3])
        outputs = [
            helper.make_tensor_value_info("labels", TensorProto.UINT8, ["N", *size]),
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 3, *size]),
        ]
        chosen = outputs if output == "both" else outputs[:1]
        graph = helper.make_graph(nodes, "looking", [images], chosen, tensors)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        model.metadata_props.add(key="srdeploy.spec", value=tiny_spec.to_json())
        path = tmp_path_factory.mktemp("looking") / f"{output}.onnx"
        onnx.save(model, str(path))
        return path

    return write


lengths = st.integers(1, 700)
tiles = st.integers(64, 200)
grids = st.sampled_from([1, 8, 32])


@settings(max_examples=200, deadline=None)
@given(lengths, tiles, st.integers(0, 150), grids, st.booleans())
def test_tiles_cover_an_axis_on_the_grid_with_the_overlap(
    length: int, tile: int, overlap: int, grid: int, exact: bool
) -> None:
    overlap = min(overlap, tile - grid)
    found = spans(length, tile, overlap, grid, exact)
    assert (found[0].start, found[-1].end) == (0, length)
    for before, after in zip(found, found[1:], strict=False):
        assert before.start < after.start
        assert before.end - after.start >= overlap
        assert before.length == tile
        assert before.start % grid == 0
    if len(found) > 1:
        assert found[-1].length == tile if exact else tile <= found[-1].length < tile + grid


@settings(max_examples=200, deadline=None)
@given(lengths, tiles, st.integers(0, 150), grids, st.booleans())
def test_weights_sum_to_1_and_every_pixel_has_one_tile_that_decides(
    length: int, tile: int, overlap: int, grid: int, exact: bool
) -> None:
    overlap = min(overlap, tile - grid)
    found = spans(length, tile, overlap, grid, exact)
    total = np.zeros(length)
    for span, weight in zip(found, blending(found, overlap), strict=True):
        assert weight.min() >= 0
        total[span.start : span.end] += weight
    np.testing.assert_allclose(total, 1, atol=1e-6)
    own = cuts(found)
    assert [(one.start, one.end) for one in own] == [
        (before, after)
        for before, after in zip(
            [0, *(one.end for one in own[:-1])],
            [*(one.end for one in own[:-1]), length],
            strict=True,
        )
    ]
    for span, mine in zip(found, own, strict=True):
        assert span.start <= mine.start <= mine.end <= span.end


def test_the_outer_quarter_of_an_overlap_does_not_count() -> None:
    found = spans(160, 96, 32, 32, exact=False)
    first, second = blending(found, 32)
    assert (first[:72] == 1).all()
    assert (first[88:] == 0).all()
    assert (second[:8] == 0).all()


@pytest.mark.parametrize("size", [(200, 333), (97, 64), (64, 301), (256, 256)])
@pytest.mark.parametrize("batch", [1, 3])
def test_tiles_give_the_logits_of_the_whole_image(
    looking: Callable[..., Path], size: tuple[int, int], batch: int
) -> None:
    """An overlap of four times the network's reach leaves nothing of the tiles' edges."""
    images = images_of(2, *size)
    with open_runtime(looking()) as whole:
        expected, labels = whole.logits(images), whole.run(images)
    with TiledRuntime(open_runtime(looking()), (96, 96), 4 * REACH + 4, batch) as tiled:
        np.testing.assert_allclose(tiled.logits(images), expected, atol=1e-5)
        close = np.sort(expected, axis=1)
        sure = close[:, -1] - close[:, -2] > 1e-4
        assert (tiled.run(images) == labels)[sure].all()


def test_labels_alone_are_cut_in_the_middle_of_the_overlap_and_equal_too(
    looking: Callable[..., Path],
) -> None:
    images = images_of(1, 200, 333)
    with open_runtime(looking("labels")) as whole:
        expected = whole.run(images)
    with TiledRuntime(open_runtime(looking("labels")), (96, 96), 32) as tiled:
        assert not tiled.gives_logits
        assert (tiled.run(images) != expected).mean() < 1e-4


def test_without_overlap_the_edges_differ_and_the_interior_does_not(
    looking: Callable[..., Path],
) -> None:
    images = images_of(1, 128, 128)
    with open_runtime(looking()) as whole:
        expected = whole.logits(images)
    with TiledRuntime(open_runtime(looking()), (64, 64), 0) as tiled:
        found = tiled.logits(images)
    near = np.zeros(128, bool)
    near[64 - REACH : 64 + REACH] = True
    inside = ~(near[:, None] | near)
    assert np.array_equal(found[0, :, inside], expected[0, :, inside])
    assert not np.allclose(found, expected, atol=1e-3)


def test_a_graph_of_one_size_takes_images_of_any_size(looking: Callable[..., Path]) -> None:
    images = images_of(1, 150, 70)
    with open_runtime(looking()) as whole:
        expected = whole.run(images)
    fixed = open_runtime(looking(size=(64, 96)))
    with pytest.raises(UserError, match="use --tile 64x96"):
        TiledRuntime(fixed, (96, 96))
    with TiledRuntime(fixed, (64, 96), 32) as tiled:
        found = tiled.run(images)
    inside = found[0, :, : 70 - REACH] == expected[0, :, : 70 - REACH]
    assert inside.mean() > 0.999


def test_small_images_are_padded_and_the_result_is_cut(make_graph: MakeGraph) -> None:
    images = images_of(3, 5, 40)
    with TiledRuntime(open_runtime(make_graph()), (64, 64), 0) as tiled:
        assert np.shares_memory(fit(images[0], tiled.spec), images)
        expected = images[..., [1, 0, 2]].argmax(-1)
        assert (tiled.run(images) == expected).all()


@pytest.mark.parametrize(
    ("tile", "overlap", "message"),
    [((64, 64), 40, "are too small"), ((16, 64), 0, "are too small")],
)
def test_tiles_that_can_not_be_laid_are_refused(
    make_graph: MakeGraph, tile: tuple[int, int], overlap: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        TiledRuntime(open_runtime(make_graph()), tile, overlap)


def test_only_a_band_of_the_logits_is_in_memory(
    make_graph: MakeGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest array made by the tiles is that of one row of tiles."""
    largest = 0
    zeros = np.zeros

    def noted(shape: Any, dtype: Any = float) -> Any:
        nonlocal largest
        made = zeros(shape, dtype)
        largest = max(largest, made.size)
        return made

    monkeypatch.setattr("srdeploy.serve.tiled_runtime.np.zeros", noted)
    with TiledRuntime(open_runtime(make_graph(output="both")), (64, 64), 32) as tiled:
        tiled.run(images_of(1, 1000, 128))
    assert 0 < largest <= 3 * (64 + 31) * 128


def test_it_is_what_the_inner_one_is(make_graph: MakeGraph) -> None:
    inner: Runtime = open_runtime(make_graph())
    with TiledRuntime(inner, (64, 64)) as tiled:
        assert (tiled.backend, tiled.device, tiled.path) == ("onnxruntime", "cpu", inner.path)
        assert tiled.precision == inner.precision
        inner.run(images_of(1, 40, 40))
    with pytest.raises(UserError, match="is not open"):
        inner.run(images_of(1, 40, 40))
