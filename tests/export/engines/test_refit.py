"""The refit proof: without a GPU plans compared byte by byte, really; with one, on a stand-in for
it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper

from srdeploy.artifacts.artifact import EngineSidecar, read_sidecar, write_sidecar
from srdeploy.errors import UserError
from srdeploy.export.certificate import read_model
from srdeploy.export.engines import refit
from srdeploy.export.engines.build import BuildOptions
from srdeploy.export.engines.refit import compare_plans, refit_line, weights_found
from srdeploy.files import sha256_of
from srdeploy.graph.signature import read_signature
from srdeploy.imaging import Pixels

MakeTyped = Callable[..., Path]
AHEAD = BuildOptions(builder="rtx", sm=("8.9",))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_networks_that_differ_in_weights_alone_have_one_plan(
    rtx: Any, typed_graph: MakeTyped, precision: str
) -> None:
    baseline = typed_graph(precision, precision, "baseline.onnx", seed=1)
    regulated = typed_graph(precision, precision, "regulated.onnx", seed=2)
    options = AHEAD.model_copy(update={"precision": precision})
    line = refit_line(baseline, regulated, options)
    assert line.name == "refit"
    assert line.passed, line.detail
    assert "no refit was run, which needs a GPU" in line.detail
    assert line.figures["method"] == "compared plans"
    assert 0 < line.figures["bytes_that_differ"] <= line.figures["span"]


def test_plans_in_int8_that_differ_are_not_judged(rtx: Any, typed_graph: MakeTyped) -> None:
    files = [typed_graph("int8", "int8", f"{odd}.onnx", odd=odd) for odd in (None, "Relu")]
    line = refit_line(files[0], files[1], AHEAD.model_copy(update={"precision": "int8"}))
    assert line.passed is None
    assert "not judged: in int8 the measured ranges can be part of the code" in line.detail


def test_the_regulated_weights_are_in_the_plan(rtx: Any, typed_graph: MakeTyped) -> None:
    files = [typed_graph(name=f"{seed}.onnx", seed=seed, channels=32) for seed in (1, 2)]
    assert refit_line(files[0], files[1], AHEAD).figures["weights_found"] == 1.0


def test_another_network_has_another_plan(rtx: Any, typed_graph: MakeTyped) -> None:
    baseline = typed_graph(name="baseline.onnx")
    for other in (typed_graph(name="odd.onnx", odd="Relu"), typed_graph(name="b", channels=9)):
        line = refit_line(baseline, other, AHEAD)
        assert line.passed is False
        assert "differs from the baseline's beyond its weights" in line.detail


def test_one_file_twice_shows_nothing(typed_graph: MakeTyped) -> None:
    with pytest.raises(UserError, match="a refit would show nothing"):
        refit_line(typed_graph(), typed_graph(), AHEAD)


class FakePlan:
    """An engine on a GPU as a refit meets it: a file whose content stands for its weights."""

    def __init__(self, content: bytes, kernels: list[str]) -> None:
        self.content = content
        self.kernels = kernels

    def create_engine_inspector(self) -> "FakePlan":
        return self

    def get_engine_information(self, format: str) -> str:
        return f"{format}: {self.kernels[0]}"

    def create_serialization_config(self) -> "FlagSet":
        return FlagSet()

    def serialize_with_config(self, config: set[str]) -> bytes:
        assert config == {"no weights"}
        return self.kernels[0].encode()

    def serialize(self) -> bytes:
        return self.content


class FlagSet(set[str]):
    """A serialisation's flags."""

    def set_flag(self, flag: str) -> bool:
        self.add(flag)
        return True


class FakeTrt:
    """What a refit takes of TensorRT. `kernels`: those that the engine has, before and after."""

    class LayerInformationFormat:
        JSON = "json"

    class SerializationFlag:
        EXCLUDE_WEIGHTS = "no weights"

    class ILogger:
        WARNING = 2
        ERROR = 1

    def __init__(self) -> None:
        self.kernels = ["gemm", "gemm"]
        self.missing: list[str] = []
        self.refuses = ""

    def Runtime(self, logger: Any) -> "FakeTrt":
        return self

    def deserialize_cuda_engine(self, content: bytes) -> FakePlan:
        self.plan = FakePlan(content, self.kernels)
        return self.plan

    def Refitter(self, engine: FakePlan, logger: Any) -> "FakeTrt":
        return self

    def OnnxParserRefitter(self, refitter: "FakeTrt", logger: Any) -> "FakeTrt":
        return self

    num_errors = 1

    def get_error(self, index: int) -> "FakeTrt":
        return self

    def node(self) -> int:
        return 3

    def node_name(self) -> str:
        return "head/Conv"

    def node_operator(self) -> str:
        return "Conv"

    def desc(self) -> str:
        return self.refuses

    def refit_from_file(self, path: str) -> bool:
        self.plan.content = b"plan of " + Path(path).read_bytes()
        return not self.refuses

    def get_missing_weights(self) -> list[str]:
        return self.missing

    def refit_cuda_engine(self) -> bool:
        self.plan.kernels = self.kernels[1:]
        return True


class FakeRuntime:
    """Gives labels that follow from an engine's content."""

    def __init__(self, engine: Path, device: str) -> None:
        assert device == "cuda"
        assert read_sidecar(engine).engine_sha256 == sha256_of(engine)
        self.content = engine.read_bytes()

    def __enter__(self) -> "FakeRuntime":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def run(self, images: Pixels) -> Pixels:
        seed = np.frombuffer(self.content, np.uint8).astype(np.uint32)
        return np.random.default_rng(seed).integers(0, 3, images.shape[:3], dtype=np.uint8)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeTrt:
    """A machine with a GPU, where a plan is its graph's content."""
    fake = FakeTrt()

    def build(onnx: Path, engine: Path, options: BuildOptions) -> EngineSidecar:
        assert options.refittable == (onnx.name == "baseline.onnx")
        engine.write_bytes(b"plan of " + onnx.read_bytes())
        signature = read_signature(onnx)
        assert signature.spec is not None
        sidecar = EngineSidecar(
            builder="tensorrt",
            builder_version="11.4.0.106",
            compute_capabilities=("9.0",),
            gpu="NVIDIA H100",
            cuda_driver="13.0",
            precision="fp32",
            layer_types={"float32": 2},
            read_from="engine",
            profiles=(),
            engine_sha256=sha256_of(engine),
            engine_bytes=engine.stat().st_size,
            onnx=onnx.name,
            onnx_sha256=sha256_of(onnx),
            command="again",
            spec=signature.spec,
            signature=signature,
        )
        write_sidecar(engine, sidecar)
        return sidecar

    monkeypatch.setattr(refit, "target_gpu", lambda options: "NVIDIA H100")
    monkeypatch.setattr(refit, "build_engine", build)
    monkeypatch.setattr(refit, "import_tensorrt", lambda kind: fake)
    monkeypatch.setattr(refit, "open_runtime", FakeRuntime)
    return fake


def two_files(typed_graph: MakeTyped) -> tuple[Path, Path]:
    return typed_graph(name="baseline.onnx", seed=1), typed_graph(name="regulated.onnx", seed=2)


def test_on_a_gpu_the_engine_is_refitted_and_run(gpu: FakeTrt, typed_graph: MakeTyped) -> None:
    line = refit_line(*two_files(typed_graph), BuildOptions())
    assert line.passed, line.detail
    assert "was refitted on NVIDIA H100: its layers and kernels are the same" in line.detail
    assert line.figures["agreement_with_regulated"] == 1.0
    assert line.figures["agreement_with_baseline"] < 0.5
    assert line.figures["same_plan_without_weights"]


def test_a_refit_that_changes_kernels_or_misses_weights_is_told(
    gpu: FakeTrt, typed_graph: MakeTyped, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = two_files(typed_graph)
    gpu.kernels = ["gemm", "another"]
    line = refit_line(*files, BuildOptions())
    assert line.passed is False
    assert "its layers and kernels are OTHERS afterwards" in line.detail
    gpu.kernels = ["gemm", "gemm"]
    gpu.missing = ["head.bias"]
    with pytest.raises(UserError, match=r"1 weights of the engine .* the first head\.bias"):
        refit_line(*files, BuildOptions())
    gpu.refuses = "weights have another count"
    with pytest.raises(UserError, match=r"node head/Conv \(Conv\): weights have another count"):
        refit_line(*files, BuildOptions())


def test_a_refit_without_effect_fails(
    gpu: FakeTrt, typed_graph: MakeTyped, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeTrt, "refit_from_file", lambda self, path: True)
    line = refit_line(*two_files(typed_graph), BuildOptions())
    assert line.passed is False
    assert line.figures["agreement_with_baseline"] == 1.0


def test_a_change_outside_of_the_weights_is_seen() -> None:
    plan = bytes(5000)
    one = plan[:4000] + b"\1" * 400 + plan[4400:]
    assert compare_plans(plan, one, weights=400, tensors=1) == {
        "plan_bytes": 5000,
        "weight_bytes": 400,
        "bytes_that_differ": 400,
        "span": 400,
        "from": 4000,
        "same_plan": True,
    }
    two = one[:100] + b"\1" + one[101:]
    assert "spread over 4,300 bytes" in compare_plans(plan, two, 400, 1)["why"]
    assert compare_plans(plan, plan, 400, 1)["why"] == "no byte differs, not even of the weights"
    assert compare_plans(plan, one + b"\0", 400, 1)["why"] == "5,000 and 5,001 bytes long"


def test_weights_are_found_in_any_order_of_their_axes(typed_graph: MakeTyped) -> None:
    model = read_model(typed_graph())
    kernels = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    turned = b"".join(kernel.transpose(0, 2, 3, 1).tobytes() for kernel in kernels)
    assert weights_found(model, b"head" + turned) == 1.0
    assert weights_found(model, turned[: kernels[0].nbytes]) == pytest.approx(
        kernels[0].nbytes / sum(kernel.nbytes for kernel in kernels)
    )
    assert weights_found(model, bytes(4000)) == 0.0
