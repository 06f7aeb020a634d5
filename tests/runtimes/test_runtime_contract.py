"""The runtime contract, the same tests for every backend and every form of export."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from srdeploy.deployable import Deployable
from srdeploy.errors import UserError
from srdeploy.imaging import Pixels
from srdeploy.runs import load_network, open_run
from srdeploy.runtimes.base import ImageShapeError, Runtime
from srdeploy.runtimes.registry import open_runtime

FORMS = [f"{i}-{o}" for i in ("uint8", "float32") for o in ("labels", "logits", "both")]
BACKENDS = ["torch"]
BACKENDS += [f"{runtime} {form}" for runtime in ("onnxruntime", "openvino") for form in FORMS]


@pytest.fixture(scope="session", params=BACKENDS)
def make(
    request: pytest.FixtureRequest,
    run_folder: Path,
    exported: dict[str, Path],
    exported_float32: dict[str, Path],
) -> "partial[Runtime]":
    """Makes what is opened, once per backend and form."""
    backend, _, form = request.param.partition(" ")
    if backend == "openvino":
        pytest.importorskip("openvino", reason="no openvino here: its runtime was NOT tested")
    forms = exported | exported_float32
    return partial(open_runtime, forms[form] if form else run_folder, runtime=backend)


@pytest.fixture(scope="session")
def runtime(make: Callable[..., Runtime]) -> Iterator[Runtime]:
    """The artifact, opened once: OpenVINO compiles it each time."""
    with make(threads=1) as opened:
        yield opened


def photos(count: int, height: int, width: int) -> Pixels:
    """Smooth colours, so that labels form areas."""
    rng = np.random.default_rng([count, height, width])
    coarse = rng.integers(0, 256, (count, 5, 5, 3), dtype=np.uint8)
    return coarse.repeat(-(-height // 5), 1).repeat(-(-width // 5), 2)[:, :height, :width].copy()


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 33, 47), (2, 64, 40)])
def test_labels_are_those_of_the_torch_network(
    runtime: Runtime, run_folder: Path, shape: tuple[int, int, int]
) -> None:
    images = photos(*shape)
    run = open_run(run_folder)
    with torch.inference_mode():
        logits = Deployable(load_network(run), run.spec, output="logits")(torch.from_numpy(images))
    labels = runtime.run(images)
    assert labels.dtype == np.uint8
    assert labels.shape == shape
    best, second = logits.topk(2, dim=1).values.unbind(1)
    clear = (best - second).numpy() > 1e-4
    assert clear.mean() > 0.9
    assert (labels == logits.argmax(1).numpy())[clear].all()


def test_logits_lead_to_the_labels_or_are_refused(runtime: Runtime) -> None:
    images = photos(2, 40, 48)
    if runtime.path.stem.endswith("labels"):
        with pytest.raises(UserError, match="only labels: export with --output logits or both"):
            runtime.logits(images)
        return
    logits = runtime.logits(images)
    assert logits.dtype == np.float32
    assert logits.shape == (2, 3, 40, 48)
    assert (logits.argmax(1) == runtime.run(images)).mean() > 0.999


def test_what_it_is_is_known_before_it_is_opened(
    make: "partial[Runtime]", run_folder: Path
) -> None:
    runtime = make()
    assert runtime.spec == open_run(run_folder).spec
    assert runtime.backend == make.keywords["runtime"]
    assert (runtime.path, runtime.device, runtime.precision) == (make.args[0], "cpu", "float32")
    assert runtime.input_shape == (None, None, None, 3)


def test_it_must_be_open_to_run(make: Callable[..., Runtime]) -> None:
    runtime = make()
    with pytest.raises(UserError, match="not open"):
        runtime.run(photos(1, 40, 48))
    with runtime:
        runtime.run(photos(1, 40, 48))
    with pytest.raises(UserError, match="not open"):
        runtime.run(photos(1, 40, 48))


def test_it_can_be_opened_again(make: Callable[..., Runtime]) -> None:
    runtime = make()
    with runtime:
        first = runtime.run(photos(1, 40, 48))
    with runtime:
        assert (runtime.run(photos(1, 40, 48)) == first).all()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 40, 48, 3), np.float32), r"float32 \[1, 40, 48, 3\]: uint8"),
        (np.zeros((40, 48, 3), np.uint8), r"uint8 \[40, 48, 3\]: uint8 \[N, H, W, 3\]"),
        (np.zeros((1, 3, 40, 48), np.uint8), r"\[1, 3, 40, 48\]"),
        (np.zeros((1, 40, 48, 4), np.uint8), r"\[1, 40, 48, 4\]"),
        (np.zeros((0, 40, 48, 3), np.uint8), r"\[0, 40, 48, 3\]"),
        (np.zeros((1, 31, 48, 3), np.uint8), r"\[1, 31, 48, 3\].*at least 32 x 32"),
    ],
)
def test_images_it_can_not_take_are_refused_with_their_shape(
    runtime: Runtime, images: Pixels, message: str
) -> None:
    with pytest.raises(ImageShapeError, match=message):
        runtime.run(images)


def test_views_and_read_only_arrays_are_taken(runtime: Runtime) -> None:
    images = photos(1, 40, 48)
    mirrored = images[:, :, ::-1]
    frozen = mirrored.copy()
    frozen.flags.writeable = False
    assert (runtime.run(mirrored) == runtime.run(frozen)).all()


def test_the_images_are_left_as_they_were(runtime: Runtime) -> None:
    images = photos(1, 40, 48)
    before = images.copy()
    runtime.run(images)
    assert (images == before).all()


def test_the_caller_keeps_his_thread_count(make: Callable[..., Runtime]) -> None:
    before = torch.get_num_threads()
    with make(threads=before + 1) as runtime:
        runtime.run(photos(1, 32, 32))
    assert torch.get_num_threads() == before
