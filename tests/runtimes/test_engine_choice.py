"""Which engine of a deploy folder is run, and what is said where none is for this GPU."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from srdeploy.artifacts.artifact import EngineSidecar, open_artifact, write_sidecar
from srdeploy.errors import UserError
from srdeploy.graph.signature import read_signature
from srdeploy.runtimes.gpus import Gpu
from srdeploy.runtimes.registry import open_runtime
from srdeploy.runtimes.trt import compatibility

MakeGraph = Callable[..., Path]
Add = Callable[..., Path]


@pytest.fixture
def deploy(make_graph: MakeGraph) -> Path:
    """A deploy folder with a graph and no engine."""
    return make_graph("night/model.onnx").parent


@pytest.fixture
def add(deploy: Path) -> Add:
    """Adds an engine, as far as a sidecar describes one, to the deploy folder."""

    def add_engine(name: str, capability: str, gpu: str | None, age: int = 0) -> Path:
        path = deploy / name
        path.write_bytes(b"plan")
        signature = read_signature(deploy / "model.onnx")
        assert signature.spec is not None
        sidecar = EngineSidecar(
            builder="tensorrt",
            builder_version="11.4.0.106",
            compute_capabilities=(capability,),
            gpu=gpu,
            cuda_driver=None,
            precision="fp32",
            layer_types={"float32": 1},
            read_from="network",
            profiles=(),
            engine_sha256="",
            engine_bytes=4,
            onnx="model.onnx",
            onnx_sha256="",
            command="srdeploy export runs/night --trt",
            spec=signature.spec,
            signature=signature,
        )
        write_sidecar(path, sidecar)
        os.utime(path, (1000 - age, 1000 - age))
        return path

    return add_engine


@pytest.fixture(autouse=True)
def on_an_ada_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine has one GPU of compute capability 8.9."""
    monkeypatch.setattr(
        compatibility, "find_gpu", lambda index: Gpu(index, "NVIDIA L4", 24 << 30, "8.9")
    )


def test_the_engine_for_this_gpu_is_taken(deploy: Path, add: Add) -> None:
    add("model.sm75.engine", "7.5", None)
    wanted = add("model.sm89.engine", "8.9", None, age=9)
    add("model.sm90.engine", "9.0", "NVIDIA H100")
    chosen = compatibility.engine_for(open_artifact(deploy), 0)
    assert (chosen.kind, chosen.path, chosen.file) == ("engine", wanted, wanted)


def test_of_several_the_same_gpu_comes_first_and_then_the_newest(deploy: Path, add: Add) -> None:
    add("model.a.engine", "8.9", "NVIDIA RTX 4090", age=5)
    newest = add("model.b.engine", "8.9", "NVIDIA RTX 4070")
    add("model.c.engine", "8.9", None, age=7)
    assert compatibility.engine_for(open_artifact(deploy), 0).file == newest
    same = add("model.l4.engine", "8.9", "NVIDIA L4", age=9)
    assert compatibility.engine_for(open_artifact(deploy), 0).file == same


def test_without_a_fitting_engine_those_there_are_listed(deploy: Path, add: Add) -> None:
    add("model.sm75.engine", "7.5", None)
    add("model.h100.engine", "9.0", "NVIDIA H100")
    message = (
        r"no engine in .*night is for NVIDIA L4 \(compute capability 8\.9\): it holds "
        r"model\.h100\.engine for NVIDIA H100 \(compute capability 9\.0\), "
        r"model\.sm75\.engine for GPUs \(compute capability 7\.5\); .*srdeploy export RUN --trt"
    )
    with pytest.raises(UserError, match=message):
        open_runtime(deploy, device="cuda", runtime="tensorrt")


def test_a_folder_without_engines_says_how_to_build_one(deploy: Path) -> None:
    with pytest.raises(UserError, match="holds no TensorRT engine: .*export RUN --trt.*, or use"):
        open_runtime(deploy, device="cuda", runtime="tensorrt")


def test_an_engine_is_run_by_tensorrt_on_a_gpu_alone(add: Add) -> None:
    engine = add("model.sm89.engine", "8.9", None)
    assert compatibility.engine_for(open_artifact(engine), 0).file == engine
    with pytest.raises(UserError, match="tensorrt runs on an NVIDIA GPU: use --device cuda"):
        open_runtime(engine)
    with pytest.raises(UserError, match="--threads sets threads of the CPU"):
        open_runtime(engine, device="cuda", threads=2)
    with pytest.raises(UserError, match="for openvino, give the graph that it was built from"):
        open_runtime(engine, runtime="openvino")
    with pytest.raises(UserError, match="for torch, give the run folder"):
        open_runtime(engine, runtime="torch")
    with pytest.raises(UserError, match="--precision fp16: tensorrt computes what the types in"):
        open_runtime(engine, device="cuda", precision="fp16")


def test_a_gpu_that_is_absent_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from srdeploy.runtimes import gpus

    monkeypatch.setattr(gpus, "list_gpus", lambda: (Gpu(0, "NVIDIA L4", 24 << 30, "8.9"),))
    assert gpus.find_gpu(0).name == "NVIDIA L4"
    with pytest.raises(UserError, match="device cuda:1 was asked for, but CUDA sees 1 GPUs"):
        gpus.find_gpu(1)
