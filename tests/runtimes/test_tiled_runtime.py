"""Tiles give what the whole image gives, whatever its size, in little memory."""

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
from srdeploy.runtimes.base import Runtime
from srdeploy.runtimes.registry import open_runtime
from srdeploy.runtimes.views import AugmentedRuntime, TiledRuntime
from srdeploy.spec import InputPolicy, Spec
from tests.conftest import colour_model

MakeGraph = Callable[..., Path]
REACH = 7
"""Pixels that the network below sees around each, at most: 2 by the first convolution, 2 by the
second at half size, 2 and 1 by the resizing."""


def images_of(count: int, height: int, width: int, seed: int = 0) -> Pixels:
    """Noise."""
    shape = (count, height, width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def strongest_colour(images: Pixels) -> Pixels:
    """What the colour graph answers."""
    labels: Pixels = images[..., [1, 0, 2]].argmax(-1).astype(np.uint8)
    return labels


def noted_runs(
    runtime: Runtime, method: str, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[int, ...]]:
    """The shapes of the images that the method is given, as they come."""
    shapes: list[tuple[int, ...]] = []
    plain = getattr(runtime, method)

    def noted(images: Pixels) -> Any:
        shapes.append(images.shape)
        return plain(images)

    monkeypatch.setattr(runtime, method, noted)
    return shapes


@pytest.fixture(scope="module")
def colour_graphs(tmp_path_factory: pytest.TempPathFactory, tiny_spec: Spec) -> dict[str, Path]:
    """The colour graph by its outputs."""
    folder = tmp_path_factory.mktemp("colour")
    for output in ("both", "labels"):
        model = colour_model("uint8", output, ("N", "H", "W"), TensorProto.UINT8, 1, 0)
        model.metadata_props.add(key="srdeploy.spec", value=tiny_spec.to_json())
        onnx.save(model, str(folder / f"{output}.onnx"))
    return {output: folder / f"{output}.onnx" for output in ("both", "labels")}


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
        assert (tiled.run(images) == strongest_colour(images)).all()


def test_a_graph_of_one_width_takes_images_of_any_size(looking: Callable[..., Path]) -> None:
    images = images_of(1, 150, 170)
    with open_runtime(looking()) as whole:
        expected = whole.logits(images)
    fixed = open_runtime(looking(size=("H", 96)))
    with pytest.raises(UserError, match="takes only images of Hx96: use --tile 64x96"):
        TiledRuntime(fixed, (64, 64))
    with TiledRuntime(fixed, (64, 96), 4 * REACH + 4) as tiled:
        # The last tile is shifted to an even column, which the stride of 2 sees alike.
        np.testing.assert_allclose(tiled.logits(images), expected, atol=1e-5)


def test_a_graph_of_one_size_may_pad_to_multiples_itself(
    make_graph: MakeGraph, tiny_spec: Spec
) -> None:
    policy = InputPolicy(smallest=(72, 72), usual=(72, 72), largest=(72, 72), multiple=32)
    spec = tiny_spec.model_copy(update={"input": policy})
    images = images_of(1, 100, 100)
    fixed = open_runtime(make_graph(size=("N", 72, 72), spec=spec))
    with TiledRuntime(fixed, (72, 72), 16) as tiled:
        assert (tiled.run(images) == strongest_colour(images)).all()


def test_an_image_in_one_tile_has_the_labels_of_the_graph_itself(
    make_graph: MakeGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = images_of(5, 40, 64)
    inner = open_runtime(make_graph(output="both"))
    monkeypatch.setattr(inner, "logits", None)
    ran = noted_runs(inner, "run", monkeypatch)
    with TiledRuntime(inner, (64, 64), 0, batch=2) as tiled:
        assert (tiled.run(images) == strongest_colour(images)).all()
    assert ran == [(2, 40, 64, 3), (2, 40, 64, 3), (1, 40, 64, 3)]


def test_tiles_of_one_size_run_in_batches(
    make_graph: MakeGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = open_runtime(make_graph(output="both"))
    ran = noted_runs(inner, "logits", monkeypatch)
    with TiledRuntime(inner, (64, 64), 32, batch=4) as tiled:
        tiled.run(images_of(1, 64, 230))
    assert ran == [(4, 64, 64, 3), (1, 64, 64, 3), (1, 64, 70, 3)]


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 260), st.integers(1, 260)),
    st.tuples(st.integers(64, 150), st.integers(64, 150)),
    st.integers(0, 100),
    st.sampled_from(["both", "labels"]),
)
def test_a_network_that_looks_at_each_pixel_alone_does_so_through_any_tiles(
    colour_graphs: dict[str, Path],
    size: tuple[int, int],
    tile: tuple[int, int],
    overlap: int,
    output: str,
) -> None:
    images = images_of(2, *size)
    inner = open_runtime(colour_graphs[output])
    with TiledRuntime(inner, tile, min(overlap, min(tile) - 32), batch=3) as tiled:
        found = tiled.run(images)
        if output == "both":
            expected = images[..., [1, 0, 2]].transpose(0, 3, 1, 2)
            np.testing.assert_allclose(tiled.logits(images), expected, rtol=1e-6)
    expected = images[..., [1, 0, 2]]
    ordered = np.sort(expected, axis=-1)
    sure = ordered[..., -1] > ordered[..., -2]  # blending may part equal values
    assert (found == strongest_colour(images))[sure].all()


def test_where_one_tile_counts_alone_its_logits_are_unchanged(
    looking: Callable[..., Path],
) -> None:
    images = images_of(1, 96, 160)
    inner = open_runtime(looking())
    with TiledRuntime(inner, (96, 96), 32) as tiled:
        found = tiled.logits(images)
        left, right = inner.logits(images[:, :, :96]), inner.logits(images[:, :, 64:])
    assert np.array_equal(found[..., :72], left[..., :72])
    assert np.array_equal(found[..., 88:], right[..., 24:])


def test_runs_of_torch_are_tiled_and_mirrored_too(run_folder: Path) -> None:
    images = images_of(1, 100, 64)
    inner = AugmentedRuntime(open_runtime(run_folder), [1.0, 0.5], True)
    with TiledRuntime(inner, (64, 64), 32) as tiled:
        logits = tiled.logits(images)
        assert (tiled.run(images) == logits.argmax(1)).all()


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

    monkeypatch.setattr("srdeploy.runtimes.views.np.zeros", noted)
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
