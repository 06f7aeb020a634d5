"""Engines' sidecars, and the guard that speaks before TensorRT does."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from srdeploy.artifacts.artifact import (
    EngineSidecar,
    Profile,
    check_whole,
    engine_name,
    open_artifact,
    read_sidecar,
    sidecar_path,
    write_sidecar,
)
from srdeploy.errors import MissingPackageError, UserError
from srdeploy.files import sha256_of
from srdeploy.graph.signature import read_signature
from srdeploy.runtimes.gpus import Gpu
from srdeploy.runtimes.trt import compatibility
from srdeploy.runtimes.trt.compatibility import EngineHost, check_fits, engine_host

PROFILE = Profile(smallest=(1, 32, 32), usual=(1, 48, 64), largest=(4, 64, 80))
L4 = EngineHost(
    gpu="NVIDIA L4",
    compute_capability="8.9",
    builder="tensorrt",
    builder_version="11.4.0.106",
    cuda_driver="13.0",
)


@pytest.fixture
def engine(tmp_path: Path, make_graph: Callable[..., Path]) -> Path:
    """A file that stands for a plan built on an L4, and its sidecar."""
    onnx = make_graph()
    path = tmp_path / "model.nvidia-l4.engine"
    path.write_bytes(bytes(range(256)) * 8)
    signature = read_signature(onnx)
    assert signature.spec is not None
    sidecar = EngineSidecar(
        builder="tensorrt",
        builder_version=L4.builder_version,
        compute_capabilities=("8.9",),
        gpu=L4.gpu,
        cuda_driver=L4.cuda_driver,
        precision="fp16",
        layer_types={"float16": 3},
        read_from="engine",
        profiles=(PROFILE,),
        engine_sha256=sha256_of(path),
        engine_bytes=path.stat().st_size,
        onnx=onnx.name,
        onnx_sha256=sha256_of(onnx),
        command="srdeploy export runs/a --precision fp16 --trt",
        spec=signature.spec,
        signature=signature,
    )
    write_sidecar(path, sidecar)
    return path


def test_a_sidecar_comes_back_as_it_was_written(engine: Path) -> None:
    sidecar = read_sidecar(engine)
    write_sidecar(engine, sidecar)
    assert read_sidecar(engine) == sidecar
    assert open_artifact(engine).signature == sidecar.signature


def test_the_machine_that_it_was_built_on_fits(engine: Path) -> None:
    check_fits(read_sidecar(engine), L4)
    check_fits(read_sidecar(engine), replace(L4, gpu="NVIDIA RTX 4000 Ada"))
    check_fits(read_sidecar(engine), replace(L4, builder_version="11.4.0.200"))
    check_fits(read_sidecar(engine), replace(L4, cuda_driver="13.3"))


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (
            {"gpu": "NVIDIA T4", "compute_capability": "7.5"},
            "compute capability: built for 8.9 (NVIDIA L4), here 7.5 (NVIDIA T4)",
        ),
        (
            {"builder_version": "11.4.1.3"},
            "TensorRT version: built for 11.4.0.106, here 11.4.1.3",
        ),
        (
            {"builder_version": "10.16.1.11"},
            "TensorRT version: built for 11.4.0.106, here 10.16.1.11",
        ),
        (
            {"builder": "rtx", "builder_version": "1.7.1.116"},
            "builder: built for TensorRT, here TensorRT for RTX",
        ),
        ({"cuda_driver": "12.9"}, "CUDA version of the driver: built for 13.0, here 12.9"),
    ],
)
def test_what_differs_is_named_with_the_command_that_builds_it_again(
    engine: Path, other: dict[str, Any], told: str
) -> None:
    sidecar = read_sidecar(engine)
    with pytest.raises(UserError) as error:
        check_fits(sidecar, replace(L4, **other))
    assert f"({told}). Build it here: {sidecar.command}" in str(error.value)


def test_every_field_that_differs_is_named_at_once(engine: Path) -> None:
    there = replace(L4, compute_capability="9.0", gpu="NVIDIA H100", builder_version="10.8.0.43")
    with pytest.raises(UserError, match=r"TensorRT version: .*; compute capability: .*"):
        check_fits(read_sidecar(engine), there)


def test_an_engine_for_rtx_is_bound_to_the_whole_version_and_runs_on_what_it_was_built_for(
    engine: Path,
) -> None:
    sidecar = read_sidecar(engine).model_copy(
        update={
            "builder": "rtx",
            "builder_version": "1.7.1.116",
            "compute_capabilities": ("8.6", "8.9"),
            "gpu": None,
            "cuda_driver": None,
        }
    )
    here = replace(L4, builder="rtx", builder_version="1.7.1.116", compute_capability="8.6")
    check_fits(sidecar, here)
    with pytest.raises(UserError, match=r"TensorRT for RTX version: built for 1.7.1.116, here"):
        check_fits(sidecar, replace(here, builder_version="1.7.1.117"))
    with pytest.raises(UserError, match=r"built for 8\.6 and 8\.9, here 9\.0 \(NVIDIA L4\)"):
        check_fits(sidecar, replace(here, compute_capability="9.0"))


def test_a_truncated_or_another_file_is_refused(engine: Path) -> None:
    sidecar = read_sidecar(engine)
    check_whole(engine, sidecar)
    whole = engine.read_bytes()
    engine.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"is truncated: it has 1,948 of 2,048 bytes"):
        check_whole(engine, sidecar)
    engine.write_bytes(whole[::-1])
    with pytest.raises(UserError, match=r"not the engine that model.nvidia-l4.engine.json descri"):
        check_whole(engine, sidecar)
    engine.unlink()
    with pytest.raises(UserError, match="no such engine"):
        check_whole(engine, sidecar)


def test_a_missing_or_foreign_sidecar_is_told(engine: Path) -> None:
    sidecar_path(engine).write_text('{"version": 2}')
    with pytest.raises(UserError, match=r"model.nvidia-l4.engine.json: '"):
        read_sidecar(engine)
    sidecar_path(engine).unlink()
    with pytest.raises(UserError, match="copy both files, or build it again"):
        read_sidecar(engine)


def test_a_profile_grows(engine: Path) -> None:
    assert PROFILE.text() == "1x32x32,1x48x64,4x64x80"
    assert PROFILE.covers((4, 64, 80))
    assert not PROFILE.covers((5, 64, 80))
    with pytest.raises(ValueError, match="must grow"):
        Profile(smallest=(1, 32, 32), usual=(1, 16, 64), largest=(4, 64, 80))


def test_names_say_where_an_engine_runs() -> None:
    assert engine_name("NVIDIA GeForce RTX 4090", ("8.9",)) == (
        "model.nvidia-geforce-rtx-4090.engine"
    )
    assert engine_name(None, ("8.6", "8.9"), "seg") == "seg.sm86-sm89.engine"


def test_the_machine_is_asked_for_package_gpu_and_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    class Package:
        __version__ = "11.4.0.106"

    gpu = Gpu(index=1, name="NVIDIA L4", memory_bytes=24 * 2**30, compute_capability="8.9")
    monkeypatch.setattr(compatibility, "import_tensorrt", lambda builder: Package)
    monkeypatch.setattr(compatibility, "find_gpu", {1: gpu}.__getitem__)
    monkeypatch.setattr(compatibility, "cuda_driver_version", lambda: "13.0")
    assert engine_host("tensorrt", 1) == L4


def test_an_absent_package_comes_with_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(MissingPackageError, match=r"pip install tensorrt "):
        engine_host("tensorrt")
