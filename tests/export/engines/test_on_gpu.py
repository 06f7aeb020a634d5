"""The whole way on a machine with an NVIDIA GPU and TensorRT: build, read back, run, guard,
refit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from srdeploy.artifacts.artifact import Builder, Profile, read_sidecar, write_sidecar
from srdeploy.errors import MissingPackageError, UserError
from srdeploy.export.engines.build import RTX_CAPABILITIES, BuildOptions, build_engine, target_name
from srdeploy.export.engines.refit import refit_line
from srdeploy.imaging import Pixels
from srdeploy.precision import Precision
from srdeploy.runtimes.gpus import list_gpus
from srdeploy.runtimes.registry import open_runtime
from srdeploy.runtimes.trt.engine import import_tensorrt

MakeTyped = Callable[..., Path]
WIDE = Profile(smallest=(1, 32, 32), usual=(1, 48, 64), largest=(2, 64, 80))
SHAPES = ((1, 32, 32), (1, 48, 64), (2, 64, 80))
AGREEMENT: dict[Precision, float] = {
    "fp32": 0.999,
    "tf32": 0.99,
    "fp16": 0.99,
    "bf16": 0.95,
    "int8": 0.95,
}
"""With onnxruntime, on random weights whose classes lie close together."""
TYPES: dict[Precision, str] = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "int8": "int8",
}

pytestmark = pytest.mark.tensorrt


@pytest.fixture(params=["tensorrt", "rtx"])
def kind(request: pytest.FixtureRequest) -> Builder:
    """Each builder that can build for this machine's GPU; else a skip that says what was not
    tested."""
    kind: Builder = request.param
    untested = f"engines of {kind} were NOT built, run and refitted"
    try:
        import_tensorrt(kind)
        gpus = list_gpus()
    except MissingPackageError as error:
        pytest.skip(f"{error}: {untested}")
    except UserError as error:
        pytest.skip(f"{error}: {untested}")
    if not gpus:
        pytest.skip(f"CUDA sees no GPU: {untested}")
    if kind == "rtx" and gpus[0].compute_capability not in RTX_CAPABILITIES:
        pytest.skip(f"compute capability {gpus[0].compute_capability}: {untested}")
    return kind


def options_for(kind: Builder, **values: Any) -> BuildOptions:
    return BuildOptions(**{"builder": kind, "profiles": (WIDE,), "command": "again", **values})


def photos(shape: tuple[int, int, int]) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


def labels_of(path: Path, device: str, images: Pixels) -> Pixels:
    with open_runtime(path, device) as runtime:
        return runtime.run(images)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16", "int8"])
def test_an_engine_computes_what_its_graph_does_in_the_types_that_were_asked_for(
    kind: Builder, precision: Precision, typed_graph: MakeTyped, tmp_path: Path
) -> None:
    typed = "fp32" if precision == "tf32" else precision
    onnx = typed_graph(typed, typed)
    options = options_for(kind, precision=precision)
    engine = tmp_path / target_name(options)
    sidecar = build_engine(onnx, engine, options)
    if precision == "tf32":
        assert set(sidecar.layer_types) <= {"float32", "tf32"}
    else:
        assert TYPES[precision] in sidecar.layer_types
    assert sidecar.read_from == ("engine" if kind == "tensorrt" else "network")
    assert sidecar.gpu == list_gpus()[0].name
    # onnxruntime's CPU has no convolution in bfloat16: the float32 graph stands for it.
    reference = typed_graph(name="reference.onnx") if precision == "bf16" else onnx
    for shape in SHAPES:
        images = photos(shape)
        found, expected = (
            labels_of(path, device, images)
            for path, device in ((engine, "cuda"), (reference, "cpu"))
        )
        assert np.mean(found == expected) >= AGREEMENT[precision], (precision, shape)


def test_a_graph_of_other_types_is_refused(
    kind: Builder, typed_graph: MakeTyped, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"fp16 was asked for, .*\(2 in float32"):
        build_engine(typed_graph(), tmp_path / "a.engine", options_for(kind, precision="fp16"))


def test_an_engine_of_elsewhere_is_refused_before_it_is_loaded(
    kind: Builder, typed_graph: MakeTyped, tmp_path: Path
) -> None:
    engine = tmp_path / "a.engine"
    sidecar = build_engine(typed_graph(), engine, options_for(kind))
    elsewhere = {"compute_capabilities": ("6.1",), "gpu": "NVIDIA TITAN Xp"}
    write_sidecar(engine, sidecar.model_copy(update=elsewhere))
    with pytest.raises(UserError, match=r"compute capability: built for 6\.1 .*: again"):
        labels_of(engine, "cuda", photos(SHAPES[0]))
    write_sidecar(engine, sidecar)
    engine.write_bytes(engine.read_bytes()[:-10])
    with pytest.raises(UserError, match="is truncated"):
        labels_of(engine, "cuda", photos(SHAPES[0]))


def test_the_baseline_is_refitted_with_the_regulated_weights(
    kind: Builder, typed_graph: MakeTyped
) -> None:
    files = [typed_graph(name=f"{seed}.onnx", seed=seed) for seed in (1, 2)]
    line = refit_line(files[0], files[1], options_for(kind))
    assert line.passed, line.detail
    assert line.figures["method"] == "refit on a GPU"
    assert line.figures["agreement_with_regulated"] > line.figures["agreement_with_baseline"]


def test_a_network_of_another_form_can_not_be_refitted(
    kind: Builder, typed_graph: MakeTyped
) -> None:
    files = [typed_graph(name=f"{channels}.onnx", channels=channels) for channels in (8, 16)]
    with pytest.raises(UserError, match=r"16\.onnx"):
        refit_line(files[0], files[1], options_for(kind))


def test_a_timing_cache_is_kept_and_read_again(typed_graph: MakeTyped, tmp_path: Path) -> None:
    try:
        import_tensorrt("tensorrt")
        gpus = list_gpus()
    except UserError as error:
        pytest.skip(f"{error}: a timing cache was NOT written and read")
    if not gpus:
        pytest.skip("CUDA sees no GPU: a timing cache was NOT written and read")
    options = options_for("tensorrt", timing_cache=tmp_path / "timing.cache")
    for name in ("a.engine", "b.engine"):
        build_engine(typed_graph(), tmp_path / name, options)
        assert (tmp_path / "timing.cache").stat().st_size > 0
        assert read_sidecar(tmp_path / name).builder == "tensorrt"
