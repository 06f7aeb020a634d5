"""OpenVINO's runtime: arithmetic that is asked for, checked in what is executed, and told."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from srdeploy.errors import MissingPackageError, UserError
from srdeploy.imaging import Pixels
from srdeploy.runtimes import openvino_runtime
from srdeploy.runtimes.base import ImageShapeError
from srdeploy.runtimes.registry import open_runtime

openvino = pytest.importorskip("openvino", reason="no openvino here: its runtime was NOT tested")

MakeGraph = Callable[..., Path]
CAPABILITIES = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def noise(count: int, height: int, width: int) -> Pixels:
    rng = np.random.default_rng([count, height, width])
    return rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def retyped(path: Path, dtype: int) -> Path:
    """The colour graph with its convolution in another float type, beside the original."""
    model = onnx.load(str(path))
    kernel = model.graph.initializer[0]
    values = numpy_helper.to_array(kernel)
    kernel.CopyFrom(
        helper.make_tensor("kernel", dtype, values.shape, values.astype(np.float32).ravel())
    )
    model.graph.node[0].attribute[0].i = dtype
    best = next(node for node in model.graph.node if node.op_type == "ArgMax")
    position = list(model.graph.node).index(best)
    widened = helper.make_node("Cast", ["logits"], ["wide"], to=TensorProto.FLOAT)
    best.input[0] = "wide"
    model.graph.node.insert(position, widened)
    model.opset_import[0].version = 22  # the first with bfloat16 convolutions
    model.ir_version = 10
    out = path.with_name(f"typed-{dtype}.onnx")
    onnx.save(model, str(out))
    return out


def quantised(path: Path) -> Path:
    """The colour graph with its last convolution quantised (u8s8)."""
    model = onnx.load(str(path))
    graph = model.graph
    conv = next(node for node in graph.node if node.output[0] == "logits")
    scale = numpy_helper.from_array(np.array(1, np.float32), "scale")
    zero = numpy_helper.from_array(np.array(0, np.uint8), "zero")
    weights = numpy_helper.to_array(graph.initializer[0]).astype(np.int8)
    del graph.initializer[0]
    graph.initializer.extend(
        [scale, zero, numpy_helper.from_array(weights, "kernel8")]
        + [numpy_helper.from_array(np.array(0, np.int8), "zero8")]
    )
    added = [
        helper.make_node("QuantizeLinear", [conv.input[0], "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"]),
        helper.make_node("DequantizeLinear", ["kernel8", "scale", "zero8"], ["kernel"]),
    ]
    position = list(graph.node).index(conv)
    for node in reversed(added):
        graph.node.insert(position, node)
    conv.input[0] = "dq"
    conv.output[0] = "raw"
    position = list(graph.node).index(conv) + 1
    graph.node.insert(
        position, helper.make_node("DequantizeLinear", ["rq", "scale", "zero"], ["logits"])
    )
    graph.node.insert(
        position, helper.make_node("QuantizeLinear", ["raw", "scale", "zero"], ["rq"])
    )
    out = path.with_name("quantised.onnx")
    onnx.save(model, str(out))
    return out


def test_labels_equal_those_of_onnxruntime_at_any_size_and_batch(make_graph: MakeGraph) -> None:
    path = make_graph(output="both", work=2)
    with open_runtime(path) as reference, open_runtime(path, runtime="openvino") as runtime:
        for shape in [(1, 40, 48), (2, 33, 47), (3, 64, 32), (1, 40, 48)]:
            images = noise(*shape)
            logits = reference.logits(images)
            np.testing.assert_allclose(runtime.logits(images), logits, atol=1e-4)
            second, best = np.sort(logits, axis=1)[:, -2:].swapaxes(0, 1)
            clear = best - second > 1e-3
            assert clear.mean() > 0.9
            assert (runtime.run(images) == reference.run(images))[clear].all()


def test_float32_is_the_default_and_is_what_is_executed(make_graph: MakeGraph) -> None:
    with open_runtime(make_graph(), runtime="openvino") as runtime:
        assert runtime.precision == "float32"
        assert str(runtime).endswith("(openvino, cpu, float32)")


@pytest.mark.parametrize(("precision", "needed"), [("bf16", "BF16"), ("fp16", "FP16")])
def test_an_arithmetic_is_there_or_refused_with_what_the_cpu_offers(
    make_graph: MakeGraph, precision: str, needed: str
) -> None:
    runtime = open_runtime(make_graph(), runtime="openvino", precision=precision)
    if needed in CAPABILITIES:
        with runtime:
            assert {"bf16": "bfloat16", "fp16": "float16"}[precision] in runtime.precision
        return
    with pytest.raises(UserError, match=rf"can't compute in {precision} on this CPU .*FP32"):
        runtime.__enter__()


def test_another_arithmetic_than_was_asked_for_is_an_error(
    make_graph: MakeGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a CPU offers bf16 and OpenVINO does not use it: the executed graph decides."""
    monkeypatch.setattr(openvino_runtime, "_layer_types", lambda compiled: {"float32"})
    monkeypatch.setattr(openvino_runtime.OpenVINORuntime, "_require_offered", lambda *_: None)
    runtime = open_runtime(make_graph(), runtime="openvino", precision="bf16")
    with pytest.raises(UserError, match="bf16 was asked for, but OpenVINO computes in float32"):
        runtime.__enter__()
    monkeypatch.setattr(openvino_runtime, "_layer_types", lambda compiled: {"bfloat16", "float32"})
    with runtime:
        assert runtime.precision == "bfloat16+float32 (stored as float32)"
    runtime = open_runtime(make_graph(), runtime="openvino")
    with pytest.raises(UserError, match=r"fp32 was asked for, but .* bfloat16\+float32"):
        runtime.__enter__()


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [(TensorProto.FLOAT16, "float16"), (TensorProto.BFLOAT16, "bfloat16")],
)
def test_sixteen_bit_graphs_run_in_float32_or_as_stored_and_say_so(
    make_graph: MakeGraph, dtype: int, stored: str
) -> None:
    path = retyped(make_graph(), dtype)
    runtime = open_runtime(path, runtime="openvino")
    assert runtime.precision == stored
    with runtime:
        # On CPUs with bfloat16, OpenVINO takes it for what is stored so.
        assert runtime.precision in {f"float32 (stored as {stored})", stored}
        images = noise(2, 40, 52)
        scores = images[..., [1, 0, 2]].astype(int)
        labels = runtime.run(images).astype(int)[..., None]
        lost = scores.max(-1) - np.take_along_axis(scores, labels, -1)[..., 0]
        # bfloat16 tells numbers below 256 apart, but for a rounding at the last bit.
        assert lost.max() <= (1 if runtime.precision == "bfloat16" else 0)


def test_a_quantised_layer_is_told_as_int8_and_the_others_as_float32(
    make_graph: MakeGraph,
) -> None:
    path = quantised(make_graph(work=1))
    with open_runtime(path) as reference, open_runtime(path, runtime="openvino") as runtime:
        assert reference.precision == runtime.precision == "float32+int8"
        images = noise(2, 40, 52)
        assert (runtime.run(images) == reference.run(images)).all()


def test_threads_and_a_single_stream_are_what_was_asked_for(
    make_graph: MakeGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []
    check = openvino_runtime.OpenVINORuntime._require_precision

    def keep(self: openvino_runtime.OpenVINORuntime, model: Any) -> str:
        compiled.append(model)
        return check(self, model)

    monkeypatch.setattr(openvino_runtime.OpenVINORuntime, "_require_precision", keep)
    with open_runtime(make_graph(), runtime="openvino", threads=1) as runtime:
        for shape in [(1, 40, 48), (2, 33, 47), (1, 40, 48)]:
            runtime.run(noise(*shape))
    (model,) = compiled  # compiled once, whatever came
    assert model.get_property("INFERENCE_NUM_THREADS") == 1
    assert model.get_property("NUM_STREAMS") == 1
    assert model.get_property("ENABLE_CPU_PINNING") is False


def test_labels_stay_when_the_next_images_come(make_graph: MakeGraph) -> None:
    with open_runtime(make_graph(), runtime="openvino") as runtime:
        first = runtime.run(noise(1, 40, 48))
        before = first.copy()
        runtime.run(noise(1, 40, 48)[:, ::-1])
        assert (first == before).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda"}, "openvino runs on the CPU here, not on cuda"),
        ({"precision": "int8"}, "computes in fp32, bf16 or fp16, not in 'int8'"),
        ({"precision": "bf-16"}, "not in 'bf-16' .*did you mean 'bf16'"),
    ],
)
def test_what_it_does_not_do_is_refused_at_once(
    make_graph: MakeGraph, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        open_runtime(make_graph(), runtime="openvino", **options)


def test_a_graph_that_it_can_not_load_or_run_is_named(make_graph: MakeGraph) -> None:
    path = make_graph()
    model = onnx.load(str(path))
    model.graph.node[0].op_type = "Unheard"
    onnx.save(model, str(path))
    with pytest.raises(UserError, match=r"colour\.onnx: OpenVINO can't load it \(.*Unheard"):
        open_runtime(path, runtime="openvino").__enter__()
    model = onnx.load(str(make_graph("add.onnx", output="logits")))
    fixed = numpy_helper.from_array(np.zeros((1, 3, 40, 48), np.float32), "fixed")
    model.graph.initializer.append(fixed)
    model.graph.node[2].output[0] = "raw"
    model.graph.node.append(helper.make_node("Add", ["raw", "fixed"], ["logits"]))
    onnx.save(model, str(path))
    with open_runtime(path, runtime="openvino") as runtime:
        runtime.run(noise(1, 40, 48))
        with pytest.raises(ImageShapeError, match=r"failed on images \[1, 41, 48, 3\]"):
            runtime.run(noise(1, 41, 48))


def test_without_the_package_the_pip_line_is_told(
    make_graph: MakeGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingPackageError, match=r"pip install openvino"):
        open_runtime(make_graph(), runtime="openvino").__enter__()


def test_a_graph_runs_without_torch_and_onnxruntime(make_graph: MakeGraph) -> None:
    code = f"""
import sys
import numpy as np
from srdeploy.runtimes.registry import open_runtime
with open_runtime({str(make_graph())!r}, runtime="openvino", threads=1) as runtime:
    runtime.run(np.zeros((1, 40, 48, 3), np.uint8))
assert not {{"torch", "onnxruntime"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_verbs_take_runtime_and_precision(
    srdeploy: Callable[..., tuple[int, str, str]], make_graph: MakeGraph, tiny_data: Path
) -> None:
    graph = make_graph()
    code, out, _ = srdeploy("evaluate", graph, tiny_data, "--runtime", "openvino", "--json")
    assert code == 0
    assert '"backend": "openvino", "device": "cpu", "precision": "float32"' in out
    code, _, err = srdeploy("evaluate", graph, tiny_data, "--precision", "bf16")
    assert code == 2
    assert "--precision bf16: onnxruntime computes what the types in" in err


def test_first_runs_of_several_sessions_at_once_do_not_wait_for_each_other(
    make_graph: MakeGraph,
) -> None:
    """With quick switches between threads nearly every process hung: the runs' first look at
    OpenVINO's types met another thread's."""
    code = (
        "import sys, threading, numpy as np\n"
        "from srdeploy.runtimes.registry import open_runtime\n"
        f"opened = [open_runtime({str(make_graph())!r}, runtime='openvino', threads=1)"
        ".__enter__() for _ in range(4)]\n"
        "sys.setswitchinterval(1e-6)\n"
        "gate = threading.Barrier(4)\n"
        "images = np.zeros((1, 40, 48, 3), np.uint8)\n"
        "def go(one):\n    gate.wait()\n    one.run(images)\n"
        "threads = [threading.Thread(target=go, args=(one,)) for one in opened]\n"
        "[one.start() for one in threads]\n"
        "[one.join() for one in threads]\n"
    )
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
