"""What can't be opened or run says so in one line; graphs of other tools work where they can."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional

from srdeploy.artifacts.artifact import open_artifact, spec_from_classes
from srdeploy.errors import UserError
from srdeploy.imaging import normalise
from srdeploy.runtimes.base import ImageShapeError
from srdeploy.runtimes.registry import open_runtime
from srdeploy.spec import InputPolicy, Spec

MakeGraph = Callable[..., Path]


def noise(count: int, height: int, width: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def strongest(images: np.ndarray) -> np.ndarray:
    """What the colour graph says: the strongest of green, red, blue."""
    return np.asarray(images[..., [1, 0, 2]].argmax(-1))


def test_run_deploy_and_onnx_are_told_apart(run_folder: Path, make_graph: MakeGraph) -> None:
    deploy = make_graph("night/model.onnx")
    assert open_artifact(run_folder).kind == "run"
    assert open_artifact(deploy.parent).kind == "deploy"
    assert open_artifact(deploy).kind == "onnx"
    assert open_artifact(deploy.parent).file == deploy


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file or folder: .*nothing\.onnx"):
        open_runtime(tmp_path / "nothing.onnx")


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a run folder .* nor a deploy folder"):
        open_runtime(tmp_path)


def test_a_file_of_another_kind_is_refused(run_folder: Path) -> None:
    with pytest.raises(UserError, match=r"safetensors: give a run folder, .* or an .engine file"):
        open_runtime(run_folder / "network.safetensors")


@given(content=st.binary(max_size=64))
@settings(deadline=None, max_examples=40)
def test_a_file_that_is_no_onnx_is_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("broken") / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.onnx: not an ONNX file"):
        open_runtime(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_truncated_file_is_refused(make_graph: MakeGraph, share: float) -> None:
    path = make_graph(work=1)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match="colour.onnx: "), open_runtime(path):
        pass


def test_a_graph_that_onnxruntime_can_not_load_is_refused(make_graph: MakeGraph) -> None:
    path = make_graph()
    model = onnx.load(str(path))
    model.graph.node[0].op_type = "Unheard"
    onnx.save(model, str(path))
    with pytest.raises(UserError, match=r"onnxruntime can't load it \(.*Unheard"):
        open_runtime(path).__enter__()


def test_without_metadata_the_classes_must_be_given(make_graph: MakeGraph, tiny_spec: Spec) -> None:
    path = make_graph(spec=None)
    with pytest.raises(UserError, match=r"no srdeploy metadata .* --classes classes\.json"):
        open_runtime(path)
    with open_runtime(path, spec=tiny_spec) as runtime:
        images = noise(1, 40, 48)
        assert (runtime.run(images) == strongest(images)).all()


def test_classes_beside_metadata_that_differ_are_refused(
    make_graph: MakeGraph, tiny_spec: Spec
) -> None:
    path = make_graph()
    open_runtime(path, spec=tiny_spec)
    other = tiny_spec.model_copy(update={"mean": (0.5, 0.5, 0.5)})
    with pytest.raises(UserError, match="has its own classes .* leave --classes away"):
        open_runtime(path, spec=other)


def test_a_class_list_of_another_length_is_refused(make_graph: MakeGraph) -> None:
    two = Spec(classes=("a", "b"), palette=((0, 0, 0), (9, 9, 9)))
    with pytest.raises(UserError, match="its logits have 3 classes, but the class list has 2"):
        open_runtime(make_graph(spec=None, output="logits"), spec=two)
    with pytest.raises(UserError, match="its logits have 3 classes, but the class list has 2"):
        open_runtime(make_graph(spec=two, output="logits"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"classes": ["a", "b"]}', "'palette' is missing"),
        ('{"classes": ["a", "b"], "paletto": []}', "palett"),
    ],
)
def test_broken_metadata_is_named(make_graph: MakeGraph, text: str, message: str) -> None:
    path = make_graph(spec=None)
    model = onnx.load(str(path))
    model.metadata_props.add(key="srdeploy.spec", value=text)
    onnx.save(model, str(path))
    with pytest.raises(UserError, match=f"metadata 'srdeploy.spec': .*{message}"):
        open_runtime(path)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cpu:1", "cpu:", "", "CUDA"])
def test_an_unknown_device_is_refused(make_graph: MakeGraph, device: str) -> None:
    with pytest.raises(UserError, match=f"unknown device '{device}'"):
        open_runtime(make_graph(), device=device)


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="has CUDA"
)
def test_cuda_asked_but_absent_is_refused_by_onnxruntime(make_graph: MakeGraph) -> None:
    with pytest.raises(UserError, match=r"device cuda:1 was asked for.*install onnxruntime-gpu"):
        open_runtime(make_graph(), device="cuda:1").__enter__()


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="has CUDA"
)
def test_a_session_that_fell_back_to_the_cpu_is_refused(
    make_graph: MakeGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU package offers CUDA even where no driver is, and then starts on the CPU."""
    listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    with pytest.raises(UserError, match=r"could not start CUDA \(.*cuda\.so: cannot open shared"):
        open_runtime(make_graph(), device="cuda").__enter__()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_cuda_asked_but_absent_is_refused_by_torch(run_folder: Path) -> None:
    with pytest.raises(UserError, match=r"device cuda was asked for.* sees 0 CUDA devices"):
        open_runtime(run_folder, device="cuda").__enter__()


def test_a_runtime_that_can_not_run_the_artifact_is_refused(
    run_folder: Path, make_graph: MakeGraph
) -> None:
    for runtime in ("onnxruntime", "onnxruntime-tensorrt", "openvino"):
        with pytest.raises(UserError, match=rf"for {runtime}, export it first \(.*narrow\)"):
            open_runtime(run_folder, runtime=runtime)
    with pytest.raises(UserError, match=r"for tensorrt, export it first \(.*narrow --trt\)"):
        open_runtime(run_folder, runtime="tensorrt")
    with pytest.raises(UserError, match="for torch, give the run folder"):
        open_runtime(make_graph(), runtime="torch")
    with pytest.raises(UserError, match="is a graph and not an engine: .*onnxruntime-tensorrt"):
        open_runtime(make_graph(), runtime="tensorrt")
    with pytest.raises(UserError, match="onnxruntime-tensorrt runs on an NVIDIA GPU: use --device"):
        open_runtime(make_graph(), runtime="onnxruntime-tensorrt")
    with pytest.raises(UserError, match="--precision bf16: torch computes what the types in"):
        open_runtime(run_folder, precision="bf16")
    with pytest.raises(UserError, match="unknown runtime 'tourch': did you mean 'torch'"):
        open_runtime(make_graph(), runtime="tourch")


def test_a_fixed_shape_refuses_others_and_names_both(make_graph: MakeGraph) -> None:
    with open_runtime(make_graph(size=(1, 40, "W"))) as runtime:
        assert runtime.input_shape == (1, 40, None, 3)
        runtime.run(noise(1, 40, 77))
        message = r"takes only images of \[1, 40, W, 3\], not \[1, 48, 48, 3\] \(H is 48\)"
        with pytest.raises(ImageShapeError, match=message):
            runtime.run(noise(1, 48, 48))
        with pytest.raises(ImageShapeError, match=r"not \[2, 40, 48, 3\] \(N is 2\)"):
            runtime.run(noise(2, 40, 48))


@pytest.mark.parametrize("label_type", [TensorProto.INT32, TensorProto.INT64])
def test_wide_labels_of_other_tools_become_uint8(
    make_graph: MakeGraph, tiny_spec: Spec, label_type: int
) -> None:
    path = make_graph(spec=None, label_type=label_type)
    with open_runtime(path, spec=tiny_spec) as runtime:
        images = noise(1, 40, 48)
        labels = runtime.run(images)
    assert labels.dtype == np.uint8
    assert (labels == strongest(images)).all()


@pytest.mark.parametrize("shift", [-1, 254, 256])
def test_labels_without_a_class_are_refused_rather_than_wrapped(
    make_graph: MakeGraph, tiny_spec: Spec, shift: int
) -> None:
    """256 as uint8 would read as class 0; the ignored label alone needs no class."""
    path = make_graph(spec=None, label_type=TensorProto.INT64)
    model = onnx.load(str(path))
    model.graph.node[-1].output[0] = "ids"
    model.graph.initializer.append(numpy_helper.from_array(np.array(shift), "shift"))
    model.graph.node.append(helper.make_node("Add", ["ids", "shift"], ["labels"]))
    onnx.save(model, str(path))
    green = np.zeros((1, 40, 48, 3), np.uint8)
    green[..., 1] = 255
    red = green[..., [1, 0, 2]]
    with open_runtime(path, spec=tiny_spec) as runtime:
        with pytest.raises(UserError, match=rf"gives label {shift}, .* has the ids 0\.\.2"):
            runtime.run(green)
        if shift == 254:
            assert (runtime.run(red) == tiny_spec.ignore_index).all()


@pytest.mark.parametrize("name", ["plain", "BGR"])
def test_planar_float_graphs_are_fed_what_the_spec_says(
    make_graph: MakeGraph, tiny_spec: Spec, name: str
) -> None:
    order = "BGR" if name == "BGR" else "RGB"
    given = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5), "colour_order": order}
    spec = tiny_spec.model_copy(update=given)
    path = make_graph(spec=None, input="float32", output="logits")
    with open_runtime(path, spec=spec) as runtime:
        images = noise(2, 40, 48)
        expected = (images / 255 - np.array(spec.mean)) / np.array(spec.std)
        expected = expected[..., ::-1] if order == "BGR" else expected
        expected = expected[..., [1, 0, 2]].transpose(0, 3, 1, 2)
        np.testing.assert_allclose(runtime.logits(images), expected, atol=1e-5)


@pytest.mark.parametrize("size", [(40, 48), (33, 61)])
def test_small_logits_are_enlarged_as_torch_would(
    make_graph: MakeGraph, tiny_spec: Spec, size: tuple[int, int]
) -> None:
    path = make_graph(spec=None, input="float32", output="logits", stride=4)
    images = noise(2, *size)
    low = normalise(images, tiny_spec)[:, [1, 0, 2], ::4, ::4].copy()
    expected = functional.interpolate(
        torch.from_numpy(low), size=size, mode="bilinear", align_corners=False
    ).numpy()
    with open_runtime(path, spec=tiny_spec) as runtime:
        logits = runtime.logits(images)
        labels = runtime.run(images)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert (labels == logits.argmax(1)).all()


def test_labels_of_another_size_are_refused(make_graph: MakeGraph) -> None:
    with (
        open_runtime(make_graph(stride=4)) as runtime,
        pytest.raises(UserError, match=r"gives labels \[1, 10, 12\] for images \[1, 40, 48, 3\]"),
    ):
        runtime.run(noise(1, 40, 48))


def test_a_graph_that_is_no_segmenter_is_described(make_graph: MakeGraph, tiny_spec: Spec) -> None:
    path = make_graph()
    model = onnx.load(str(path))
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT32
    onnx.save(model, str(path))
    with pytest.raises(UserError, match=r"'images' is int32 \[\?, \?, \?, 3\]; uint8"):
        open_runtime(path)
    model = onnx.load(str(make_graph(output="logits")))
    del model.graph.output[0].type.tensor_type.shape.dim[2:]
    onnx.save(model, str(path))
    with pytest.raises(UserError, match=r"output 'logits' is float \[\?, 3\]; labels"):
        open_runtime(path)


def test_a_failure_inside_the_graph_names_file_and_shape(make_graph: MakeGraph) -> None:
    path = make_graph(output="both")
    model = onnx.load(str(path))
    fixed = onnx.numpy_helper.from_array(np.zeros((1, 3, 40, 48), np.float32), "fixed")
    model.graph.initializer.append(fixed)
    model.graph.node[2].output[0] = "raw"
    model.graph.node.insert(3, onnx.helper.make_node("Add", ["raw", "fixed"], ["logits"]))
    onnx.save(model, str(path))
    with open_runtime(path) as runtime:
        runtime.run(noise(1, 40, 48))
        with pytest.raises(ImageShapeError, match=r"colour.onnx: .* images \[1, 41, 48, 3\]"):
            runtime.run(noise(1, 41, 48))


def test_the_smallest_size_of_the_spec_is_kept(make_graph: MakeGraph, tiny_spec: Spec) -> None:
    policy = InputPolicy(smallest=(64, 48), usual=(64, 64), largest=(64, 64))
    path = make_graph(spec=tiny_spec.model_copy(update={"input": policy}))
    with open_runtime(path) as runtime:
        with pytest.raises(ImageShapeError, match="at least 64 x 48"):
            runtime.run(noise(1, 63, 48))
        runtime.run(noise(1, 64, 48))


def test_classes_json_and_spec_json_both_make_a_spec(tmp_path: Path, tiny_data: Path) -> None:
    table = json.loads((tiny_data / "classes.json").read_text())
    own = tmp_path / "classes.json"
    own.write_text(json.dumps(table | {"mean": [0.5, 0.5, 0.5], "colour_order": "BGR"}))
    spec = spec_from_classes(own)
    assert (spec.classes, spec.mean) == (("field", "box", "disc"), (0.5, 0.5, 0.5))
    assert (spec.std, spec.colour_order) == (Spec.model_fields["std"].default, "BGR")
    whole = tmp_path / "spec.json"
    whole.write_text(spec.to_json())
    assert spec_from_classes(whole) == spec


def test_an_onnx_file_runs_without_torch(make_graph: MakeGraph, tiny_data: Path) -> None:
    path = make_graph()
    out = path.parent / "masks"
    code = f"""
import sys
sys.argv[1:] = {["predict", str(path), str(tiny_data / "images" / "val"), "--out", str(out)]!r}
from srdeploy.cli.main import app
app(standalone_mode=False)
sys.argv[1:] = {["evaluate", str(path), str(tiny_data)]!r}
app(standalone_mode=False)
assert "onnxruntime" in sys.modules
assert "torch" not in sys.modules, "torch was imported"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list(out.glob("val_*.png"))) == 3
