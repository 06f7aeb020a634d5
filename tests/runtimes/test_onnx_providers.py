"""onnxruntime's providers: one that does not start or does not compute is an error, and the
arithmetic that is told is the one of the graph that onnxruntime made."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from srdeploy.errors import UserError
from srdeploy.runtimes.onnx_runtime import layer_types, provider_list, require_provider
from srdeploy.runtimes.registry import open_runtime

MakeGraph = Callable[..., Path]
CPU, CUDA, TENSORRT = (f"{name}ExecutionProvider" for name in ("CPU", "CUDA", "Tensorrt"))
FLOATS = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}


def session_of(*placed: tuple[str, str, str]) -> Any:
    """Stands for a session whose nodes (provider, type, name) were placed so."""
    parts = []
    for provider, kind, name in placed:
        node = SimpleNamespace(op_type=kind, name=name)
        parts.append(SimpleNamespace(ep_name=provider, get_nodes=lambda node=node: [node]))
    return SimpleNamespace(get_provider_graph_assignment_info=lambda: parts)


def typed_graph(path: Path, dtype: int, kind: str) -> Path:
    """A graph with one layer in `dtype`: a convolution, or a product of two activations."""
    cast = helper.make_node("Cast", ["images"], ["typed"], to=dtype)
    nodes = [cast, helper.make_node("Transpose", ["typed"], ["planes"], perm=[0, 3, 1, 2])]
    weights = []
    if kind == "Conv":
        kernel = helper.make_tensor("kernel", dtype, (3, 3, 1, 1), np.eye(3).ravel())
        weights.append(kernel)
        nodes.append(helper.make_node("Conv", ["planes", "kernel"], ["out"], name="head/Conv"))
    else:
        nodes += [
            helper.make_node("Softmax", ["planes"], ["left"]),
            helper.make_node("Transpose", ["planes"], ["right"], perm=[0, 1, 3, 2]),
            helper.make_node("MatMul", ["left", "right"], ["square"], name="head/MatMul"),
            helper.make_node("MatMul", ["square", "planes"], ["out"], name="head/MatMul2"),
        ]
    nodes += [
        helper.make_node("Cast", ["out"], ["logits"], to=TensorProto.FLOAT),
        helper.make_node("ArgMax", ["logits"], ["best"], axis=1, keepdims=0),
        helper.make_node("Cast", ["best"], ["labels"], to=TensorProto.UINT8),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", "H", "W", 3])
    labels = helper.make_tensor_value_info("labels", TensorProto.UINT8, ["N", "H", "W"])
    graph = helper.make_graph(nodes, "typed", [images], [labels], weights)
    opset = [helper.make_opsetid("", 22)]  # the first with bfloat16 convolutions
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), str(path))
    return path


def optimised(path: Path, disabled: bool = False) -> Path:
    """What onnxruntime makes of the graph, or the graph with casts for its CPU kernels alone."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(path.with_suffix(".optimised.onnx"))
    if disabled:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    onnxruntime.InferenceSession(str(path), options, providers=[CPU])
    return Path(options.optimized_model_filepath)


def test_a_session_on_the_provider_that_was_asked_for_is_fine() -> None:
    session = session_of((CUDA, "Conv", "stem/Conv"), (CPU, "Gather", "shape/Gather"))
    require_provider(session, "cuda", "cuda:0")


@pytest.mark.parametrize(
    ("provider", "placed", "message"),
    [
        (
            "cuda",
            [(CUDA, "Conv", "stem/Conv"), (CPU, "Conv", "head/Conv")],
            r"device cuda:0 .* CUDA does not take 1 layers .* Conv 'head/Conv' \(left to CPU",
        ),
        (
            "tensorrt",
            [(TENSORRT, "Conv", "a"), (CUDA, "MatMul", "b"), (CUDA, "Gemm", "c")],
            r"TensorRT does not take 2 layers .* MatMul 'b' \(left to CUDAExecutionProvider\)",
        ),
        ("tensorrt", [(CPU, "Resize", "up/Resize")], "TensorRT takes no node of this graph"),
    ],
)
def test_a_partial_fall_back_is_an_error_that_names_a_layer(
    provider: Any, placed: list[tuple[str, str, str]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        require_provider(session_of(*placed), provider, "cuda:0")


def test_where_layers_lie_is_read_from_a_real_session(make_graph: MakeGraph) -> None:
    """A session on the CPU is what onnxruntime leaves where a GPU's provider takes nothing."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(str(make_graph(work=2)), options, providers=[CPU])
    require_provider(session, "cpu", "cpu")
    with pytest.raises(UserError, match=r"does not take 3 layers.*\(left to CPUExecutionProv"):
        require_provider(session, "cuda", "cuda")


def test_an_onnxruntime_that_hides_a_fall_back_is_refused() -> None:
    with pytest.raises(UserError, match=r"pip install -U 'onnxruntime-gpu>=1\.24\.1'"):
        require_provider(SimpleNamespace(), "cuda", "cuda")


def test_nothing_but_the_graph_decides_about_precision() -> None:
    (tensorrt, options), (cuda, more), cpu = provider_list("tensorrt", 1)
    assert [tensorrt, cuda, cpu] == [TENSORRT, CUDA, CPU]
    assert options == {"device_id": "1", "trt_engine_cache_enable": "0"}
    assert more == {"device_id": "1", "use_tf32": "0"}
    assert provider_list("cuda", 1) == [(CUDA, more), CPU]
    assert provider_list("cpu", 0) == [CPU]


@pytest.mark.skipif(CUDA in onnxruntime.get_available_providers(), reason="has CUDA")
@pytest.mark.parametrize(("runtime", "called"), [("auto", "CUDA"), ("tensorrt", "TensorRT")])
def test_a_provider_that_does_not_start_is_an_error_with_the_missing_library(
    make_graph: MakeGraph,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    runtime: str,
    called: str,
) -> None:
    """The GPU package offers both even where no driver is, and then starts on the CPU."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
    name = "onnxruntime-tensorrt" if runtime == "tensorrt" else runtime
    opened = open_runtime(make_graph(), device="cuda", runtime=name)
    with pytest.raises(UserError, match=rf"could not start {called} \(.*\.so: cannot open shared"):
        opened.__enter__()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("override", "told"), [(None, "float32 (TF32 allowed)"), ("0", "float32")])
def test_the_tensorrt_provider_tells_that_it_may_round_to_tf32(
    make_graph: MakeGraph, monkeypatch: pytest.MonkeyPatch, override: str | None, told: str
) -> None:
    """With a session on the CPU in place of one on a GPU."""
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    if override is not None:
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", override)
    start = onnxruntime.InferenceSession

    def on_the_cpu(path: str, *, providers: list[Any], **options: Any) -> Any:
        session = start(path, providers=[CPU])
        (part,) = session_of((TENSORRT, "Conv", "stem")).get_provider_graph_assignment_info()
        session.get_provider_graph_assignment_info = lambda: [part]
        session.get_providers = lambda: [one[0] for one in providers[:-1]]
        return session

    monkeypatch.setattr(onnxruntime, "InferenceSession", on_the_cpu)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
    runtime = open_runtime(make_graph(), device="cuda", runtime="onnxruntime-tensorrt")
    with runtime:
        assert (runtime.backend, runtime.precision) == ("onnxruntime-tensorrt", told)


def test_float16_on_the_cpu_is_told_as_what_it_is(
    make_graph: MakeGraph, tmp_path: Path, tiny_spec: Any
) -> None:
    path = typed_graph(tmp_path / "half.onnx", TensorProto.FLOAT16, "Conv")
    runtime = open_runtime(path, spec=tiny_spec)
    assert runtime.precision == "float16"
    with runtime:
        computed = "+".join(sorted(layer_types(optimised(path))))
        stored = "" if computed == "float16" else " (stored as float16)"
        assert runtime.precision == f"{computed}{stored}"


def test_bfloat16_on_the_cpu_is_refused_with_the_way_out(tmp_path: Path, tiny_spec: Any) -> None:
    path = typed_graph(tmp_path / "brain.onnx", TensorProto.BFLOAT16, "Conv")
    message = r"no bfloat16 layers for CPUs .*head/Conv.*--runtime openvino.*--precision fp16"
    with pytest.raises(UserError, match=message):
        open_runtime(path, spec=tiny_spec).__enter__()


@pytest.mark.parametrize("kind", ["Conv", "MatMul"])
@pytest.mark.parametrize("name", ["float32", "float16"])
def test_types_are_read_from_optimised_graphs(tmp_path: Path, kind: str, name: str) -> None:
    """Products of activations have no stored weights: their type follows from the casts."""
    path = typed_graph(tmp_path / "typed.onnx", FLOATS[name], kind)
    assert layer_types(path) == {name}
    for disabled in (False, True):
        assert layer_types(optimised(path, disabled)) <= {"float32", name}


def test_integer_products_count_and_integer_sums_do_not(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("QLinearAdd", ["a"] * 8, ["sum"], domain="com.microsoft"),
        helper.make_node("QLinearConv", ["a"] * 9, ["out"], domain="com.microsoft"),
    ]
    images = helper.make_tensor_value_info("a", TensorProto.UINT8, [1])
    out = helper.make_tensor_value_info("out", TensorProto.UINT8, [1])
    for count, expected in ((1, set()), (2, {"int8"})):
        graph = helper.make_graph(nodes[:count], "integers", [images], [out])
        onnx.save(helper.make_model(graph), str(tmp_path / "integers.onnx"))
        assert layer_types(tmp_path / "integers.onnx") == expected


def test_a_quantised_graph_that_is_not_fused_is_told_as_float32(
    make_graph: MakeGraph, tmp_path: Path
) -> None:
    """Kernels stored as int8 with no quantised input: onnxruntime multiplies floats."""
    path = make_graph()
    model = onnx.load(str(path))
    kernel = numpy_helper.to_array(model.graph.initializer[0]).astype(np.int8)
    del model.graph.initializer[0]
    model.graph.initializer.extend(
        [numpy_helper.from_array(kernel, "kernel8")]
        + [numpy_helper.from_array(np.array(1, np.float32), "scale")]
    )
    node = helper.make_node("DequantizeLinear", ["kernel8", "scale"], ["kernel"])
    model.graph.node.insert(0, node)
    onnx.save(model, str(path))
    with open_runtime(path) as runtime:
        assert runtime.precision == "float32 (stored as int8)"
