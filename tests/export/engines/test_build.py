"""Engines by TensorRT for RTX: a real parser and builder, and no GPU."""

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from srdeploy.artifacts.artifact import check_whole, open_artifact, read_sidecar, sidecar_path
from srdeploy.errors import MissingPackageError, UserError
from srdeploy.export.engines import build
from srdeploy.export.engines.build import (
    BuildOptions,
    attach_timing_cache,
    build_engine,
    explain_failure,
    save_timing_cache,
    target_name,
)
from srdeploy.export.engines.profiles import parse_profile
from srdeploy.files import sha256_of
from srdeploy.precision import Precision
from srdeploy.runtimes.gpus import Gpu
from srdeploy.runtimes.trt.engine import collecting_logger
from srdeploy.validation import validated

MakeTyped = Callable[..., Path]
SMALL = (parse_profile("1x32x32,1x48x64,2x64x80"),)
H100 = Gpu(index=0, name="NVIDIA H100", memory_bytes=2**36, compute_capability="9.0")


def rtx_options(**values: Any) -> BuildOptions:
    return BuildOptions(**{"builder": "rtx", "sm": ("8.9",), "profiles": SMALL, **values})


@pytest.mark.parametrize(
    ("first", "second", "precision", "types"),
    [
        ("fp32", "fp32", "fp32", {"float32": 2}),
        ("fp32", "fp32", "tf32", {"float32": 2}),
        ("fp16", "fp16", "fp16", {"float16": 2}),
        ("bf16", "bf16", "bf16", {"bfloat16": 2}),
        ("int8", "int8", "int8", {"int8": 2}),
        ("fp16", "fp32", "fp16", {"float16": 1, "float32": 1}),
        ("int8", "fp32", "int8", {"float32": 1, "int8": 1}),
    ],
)
def test_each_precision_is_built_and_read_back(
    rtx: Any,
    typed_graph: MakeTyped,
    tmp_path: Path,
    first: str,
    second: str,
    precision: Precision,
    types: dict[str, int],
) -> None:
    onnx, engine = typed_graph(first, second), tmp_path / "model.sm89.engine"
    sidecar = build_engine(onnx, engine, rtx_options(precision=precision, command="again"))
    assert sidecar.layer_types == types
    assert sidecar.read_from == "network"
    assert sidecar.figures["tf32_allowed"] == (precision == "tf32")
    assert sidecar == read_sidecar(engine)
    check_whole(engine, sidecar)
    assert (sidecar.builder, sidecar.builder_version) == ("rtx", rtx.__version__)
    assert (sidecar.compute_capabilities, sidecar.gpu, sidecar.command) == (("8.9",), None, "again")
    assert (sidecar.onnx, sidecar.onnx_sha256) == (onnx.name, sha256_of(onnx))
    assert sidecar.profiles == SMALL
    assert open_artifact(engine).kind == "engine"


@pytest.mark.parametrize(
    ("first", "second", "precision", "told"),
    [
        ("fp32", "fp32", "fp16", "(2 in float32, the first stem/Conv)"),
        ("fp32", "fp32", "int8", "(2 in float32, the first stem/Conv)"),
        ("fp16", "fp16", "fp32", "(2 in float16, the first stem/Conv)"),
        ("fp32", "fp16", "tf32", "(1 in float16, 1 in float32, the first head/Conv)"),
        ("bf16", "fp16", "bf16", "(1 in bfloat16, 1 in float16, the first head/Conv)"),
    ],
)
def test_asked_for_one_precision_and_given_another_is_an_error(
    rtx: Any,
    typed_graph: MakeTyped,
    tmp_path: Path,
    first: str,
    second: str,
    precision: Precision,
    told: str,
) -> None:
    engine = tmp_path / "model.engine"
    with pytest.raises(UserError) as error:
        build_engine(typed_graph(first, second), engine, rtx_options(precision=precision))
    assert f"{precision} was asked for, but its weighted layers compute otherwise" in str(
        error.value
    )
    assert told in str(error.value)
    assert f"srdeploy export RUN --precision {precision}" in str(error.value)
    assert not engine.exists()
    assert not sidecar_path(engine).exists()


def test_an_engine_may_be_for_several_gpus_and_profiles(
    rtx: Any, typed_graph: MakeTyped, tmp_path: Path
) -> None:
    profiles = (*SMALL, parse_profile("4x64x64"))
    options = rtx_options(sm=("7.5", "8.6", "12.0"), profiles=profiles, workspace_gib=0.25)
    assert target_name(options) == "model.sm75-sm86-sm120.engine"
    sidecar = build_engine(typed_graph(), tmp_path / target_name(options), options)
    assert sidecar.compute_capabilities == ("7.5", "8.6", "12.0")
    assert sidecar.profiles == profiles


def test_without_a_profile_the_spec_gives_one(
    rtx: Any, typed_graph: MakeTyped, tmp_path: Path
) -> None:
    options = rtx_options(profiles=(), optimization_level=0)
    sidecar = build_engine(typed_graph(), tmp_path / "model.engine", options)
    assert [profile.text() for profile in sidecar.profiles] == ["1x32x32,1x48x64,1x64x80"]


def test_what_is_built_prints_nothing(
    rtx: Any, typed_graph: MakeTyped, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    build_engine(typed_graph(), tmp_path / "model.engine", rtx_options())
    assert capfd.readouterr() == ("", "")


def test_an_operator_that_tensorrt_lacks_is_named_with_its_node(
    rtx: Any, typed_graph: MakeTyped, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"does not take node head/Odd \(Det\): "):
        build_engine(typed_graph(odd="Det"), tmp_path / "model.engine", rtx_options())


def test_what_is_no_graph_is_refused(rtx: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no graph")
    with pytest.raises(UserError, match="not an ONNX file"):
        build_engine(broken, tmp_path / "model.engine", rtx_options())


def test_a_graph_without_a_spec_is_refused(
    rtx: Any, typed_graph: MakeTyped, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="has no spec in it: attach one with srdeploy strip"):
        build_engine(typed_graph(with_spec=False), tmp_path / "model.engine", rtx_options())


@pytest.mark.parametrize(
    ("size", "profile", "told"),
    [
        (("N", 48, 64), "1x48x64,1x48x64,1x64x64", "takes only height 48, not 64"),
        ((1, "H", "W"), "1x48x64,1x48x64,2x48x64", "takes only batch 1, not 2"),
        (("N", "H", "W"), "1x16x64,1x48x64,1x64x64", "height 16 is less than the network takes"),
    ],
)
def test_a_profile_that_the_graph_does_not_take_is_refused(
    rtx: Any,
    typed_graph: MakeTyped,
    tmp_path: Path,
    size: tuple[Any, Any, Any],
    profile: str,
    told: str,
) -> None:
    options = rtx_options(profiles=(parse_profile(profile),))
    with pytest.raises(UserError, match=told):
        build_engine(typed_graph(size=size), tmp_path / "model.engine", options)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (
            {"builder": "rtx", "sm": ("9.0",)},
            "compute capability 9.0 is no target of TensorRT for RTX, which builds for 7.5, 8.0, "
            "8.6, 8.9, 12.0, 12.1",
        ),
        ({"builder": "rtx", "sm": ("8.9", "8.9")}, "stands twice among 8.9, 8.9"),
        ({"builder": "rtx", "sm": ("7.5",), "precision": "bf16"}, "do not compute in bf16"),
        ({"builder": "rtx", "sm": ("8.9", "7.5"), "precision": "tf32"}, "do not compute in tf32"),
        ({"builder": "rtx", "timing_cache": "a"}, "timing_cache goes only with TensorRT proper"),
        ({"sm": ("8.9",)}, "--sm goes only with --builder rtx"),
        ({"workspace_gib": 0}, "'workspace_gib' is '0': input should be greater than 0"),
        ({"precison": "fp16"}, "did you mean 'precision'?"),
    ],
)
def test_options_that_do_not_go_together_are_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as error:
        validated(BuildOptions, values, "--trt")
    assert str(error.value).startswith("--trt: ")
    assert told in str(error.value)


def test_without_a_gpu_an_engine_for_it_is_refused_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, typed_graph: MakeTyped, tmp_path: Path
) -> None:
    monkeypatch.setattr(build, "list_gpus", lambda: ())
    with pytest.raises(UserError, match=r"CUDA sees no GPU; .* --builder rtx --sm 8.9"):
        build_engine(typed_graph(), tmp_path / "model.engine", BuildOptions())

    def no_driver() -> tuple[Gpu, ...]:
        raise UserError("no NVIDIA driver on this machine")

    monkeypatch.setattr(build, "list_gpus", no_driver)
    with pytest.raises(UserError, match=r"no NVIDIA driver on this machine; or build ahead of"):
        target_name(BuildOptions(builder="rtx"))


def test_rtx_on_a_gpu_that_it_has_no_kernels_for_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "list_gpus", lambda: (H100,))
    with pytest.raises(UserError, match=r"NVIDIA H100: compute capability 9.0 is no target"):
        target_name(BuildOptions(builder="rtx"))
    assert target_name(BuildOptions()) == "model.nvidia-h100.engine"


def test_a_missing_package_comes_with_its_pip_line(
    monkeypatch: pytest.MonkeyPatch, typed_graph: MakeTyped, tmp_path: Path
) -> None:
    monkeypatch.setattr(build, "list_gpus", lambda: (H100,))
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingPackageError, match=r"pip install tensorrt "):
        build_engine(typed_graph(), tmp_path / "model.engine", BuildOptions())


def test_a_refittable_engine_for_rtx_needs_a_gpu(
    rtx: Any, typed_graph: MakeTyped, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="leave out refittable"):
        build_engine(typed_graph(), tmp_path / "a.engine", rtx_options(refittable=True))


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "Error Code 10: Internal Error (Could not find any implementation for node {stem}.)",
            "is probably a matter of memory",
        ),
        ("Error Code 2: OutOfMemory (Requested size was 9663676416 bytes.)", "raise workspace"),
        ("CUDA initialization failure with error: 35", "no usable NVIDIA GPU or driver"),
        (
            "Error Code 1: Cuda Runtime (cudaError 35: CUDA driver version is insufficient for "
            "CUDA runtime version)",
            "build on the machine that will run it, or ahead of time with --builder rtx",
        ),
        ("Error Code 4: Shape error", "can't build it (Error Code 4: Shape error)"),
    ],
)
def test_what_tensorrt_says_becomes_one_line_with_a_remedy(rtx: Any, said: str, told: str) -> None:
    logger = collecting_logger(rtx)
    logger.log(rtx.ILogger.WARNING, "unrelated")
    logger.log(rtx.ILogger.INFO, "chatter")
    logger.log(rtx.ILogger.ERROR, said)
    error = explain_failure(logger, "model.onnx")
    assert str(error).startswith("model.onnx: ")
    assert told in str(error)
    assert "\n" not in str(error)
    assert [message.text for message in logger.messages] == ["unrelated", said]


@dataclass
class FakeCache:
    """As TensorRT's: bytes in, bytes out."""

    stored: bytes

    def serialize(self) -> bytes:
        return self.stored + b"+measured"


class FakeConfig:
    """TensorRT for RTX has no timing cache, and TensorRT proper needs a GPU."""

    def create_timing_cache(self, serialized_timing_cache: bytes) -> FakeCache:
        return FakeCache(serialized_timing_cache)

    def set_timing_cache(self, cache: FakeCache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        return cache.stored != b"of another GPU"


def test_a_timing_cache_is_read_extended_and_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "timing.cache"
    for expected in (b"+measured", b"+measured+measured"):
        cache = attach_timing_cache(FakeConfig(), path)
        save_timing_cache(cache, path)
        assert path.read_bytes() == expected
    assert attach_timing_cache(FakeConfig(), None) is None
    path.write_bytes(b"of another GPU")
    with pytest.raises(UserError, match="is no timing cache of this TensorRT on this GPU"):
        attach_timing_cache(FakeConfig(), path)


def test_one_file_builds_to_one_engine_where_sizes_are_fixed(
    rtx: Any, typed_graph: MakeTyped, tmp_path: Path
) -> None:
    onnx = typed_graph(size=(1, 48, 64))
    digests = set()
    for name in ("a.engine", "b.engine"):
        options = rtx_options(profiles=(parse_profile("1x48x64"),))
        build_engine(onnx, tmp_path / name, options)
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1


@pytest.fixture
def as_if_proper(rtx: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """Lets TensorRT for RTX stand for TensorRT proper on a machine with an H100, whose engine's
    layers turn out as told: everything but loading the engine is real."""

    def patch(layers: dict[str, str]) -> None:
        monkeypatch.setattr(build, "list_gpus", lambda: (H100,))
        monkeypatch.setattr(build, "cuda_driver_version", lambda: "13.0")
        monkeypatch.setattr(build, "import_tensorrt", lambda kind: rtx)
        monkeypatch.setattr(build, "_inspect", lambda parsed, plan: (layers, {"layers": 7}))

    return patch


def test_an_engine_for_this_gpu_says_what_its_own_layers_compute_in(
    as_if_proper: Callable[[dict[str, str]], None], typed_graph: MakeTyped, tmp_path: Path
) -> None:
    as_if_proper({"stem/Conv": "float16", "head/Conv": "float32"})
    options = BuildOptions(precision="fp16", profiles=SMALL, workspace_gib=1)
    engine = tmp_path / target_name(options)
    sidecar = build_engine(typed_graph("fp16", "fp16"), engine, options)
    assert engine.name == "model.nvidia-h100.engine"
    assert sidecar.layer_types == {"float16": 1, "float32": 1}
    assert (sidecar.read_from, sidecar.builder) == ("engine", "tensorrt")
    assert (sidecar.gpu, sidecar.compute_capabilities) == ("NVIDIA H100", ("9.0",))
    assert (sidecar.cuda_driver, sidecar.figures["layers"]) == ("13.0", 7)


def test_an_engine_whose_layers_turn_out_otherwise_is_not_written(
    as_if_proper: Callable[[dict[str, str]], None], typed_graph: MakeTyped, tmp_path: Path
) -> None:
    as_if_proper({"stem/Conv": "float32", "head/Conv": "float32"})
    options = BuildOptions(precision="fp16", profiles=SMALL)
    with pytest.raises(UserError, match=r"fp16 was asked for, .*\(2 in float32"):
        build_engine(typed_graph("fp16", "fp16"), tmp_path / "a.engine", options)
    as_if_proper({"stem/Conv": "tf32", "head/Conv": "float32"})
    with pytest.raises(UserError, match="fp32 was asked for, but 1 layers .* multiply in tf32"):
        build_engine(typed_graph(), tmp_path / "a.engine", BuildOptions(profiles=SMALL))
    assert list(tmp_path.glob("*.engine*")) == []
