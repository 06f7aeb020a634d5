"""Exported files: exact, stable, and about nothing but the network."""

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
from torch import Tensor, nn

from srdeploy.deployable import Deployable, InputKind, OutputKind
from srdeploy.errors import UserError
from srdeploy.export.digest import graph_digest
from srdeploy.export.to_onnx import OPSET, export_onnx
from srdeploy.imaging import normalise
from srdeploy.models import make_network
from srdeploy.spec import Spec
from srdeploy.train.regulation import SelfRegulation

Randomise = Callable[..., nn.Module]


def test_a_network_that_was_regulated_exports_to_the_same_bytes_in_evaluation_or_training_mode(
    tmp_path: Path, spec: Spec, tiny: type[nn.Module], randomised: Randomise, tiny_file: Path
) -> None:
    network = randomised(tiny(), 1)
    regulated = SelfRegulation(network, 3, taps=["stem", "body"])
    labels = torch.zeros(2, 32, 32, dtype=torch.uint8)
    regulated.losses(torch.rand(2, 3, 32, 32), labels).total.backward()
    randomised(network, 1)  # the pass in training mode moved the running statistics
    module = Deployable(network.train(), spec)
    export_onnx(module, spec, tmp_path / "m.onnx", description={"srdeploy.network": "{}"})
    assert (tmp_path / "m.onnx").read_bytes() == tiny_file.read_bytes()


def test_another_process_writes_the_same_bytes(tmp_path: Path, spec: Spec) -> None:
    code = (
        "import sys, torch; from pathlib import Path\n"
        "from srdeploy.deployable import Deployable\n"
        "from srdeploy.export.to_onnx import export_onnx\n"
        "from srdeploy.spec import Spec\n"
        "torch.manual_seed(0)\n"
        "layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 3, 1)]\n"
        "network = torch.nn.Sequential(*layers)\n"
        "spec = Spec.model_validate_json(sys.argv[2])\n"
        "export_onnx(Deployable(network, spec), spec, Path(sys.argv[1]))\n"
    )
    there = tmp_path / "there.onnx"
    command = [sys.executable, "-c", code, str(there), spec.to_json()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1))
    export_onnx(Deployable(network, spec), spec, tmp_path / "here.onnx")
    assert there.read_bytes() == (tmp_path / "here.onnx").read_bytes()


def test_the_graph_follows_from_the_architecture_and_never_from_the_values_of_weights(
    tmp_path: Path, spec: Spec, tiny: type[nn.Module], tiny_file: Path
) -> None:
    network = tiny()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()  # zero biases can be dropped, equal weights can be merged
    export_onnx(Deployable(network, spec), spec, tmp_path / "zero.onnx")
    zero = onnx.load(str(tmp_path / "zero.onnx"))
    assert graph_digest(zero) == graph_digest(onnx.load(str(tiny_file)))


def test_the_file_says_nothing_about_the_machine(tiny_file: Path) -> None:
    content = tiny_file.read_bytes()
    places = [str(Path.home()), str(Path(__file__).parents[2]), sys.prefix, str(tiny_file.parent)]
    for trace in (*places, "site-packages", ".py", "pkg.torch", "stack_trace"):
        assert trace.encode() not in content, trace


def test_nodes_are_named_after_their_modules_and_weights_keep_their_names(tiny_file: Path) -> None:
    graph = onnx.load(str(tiny_file)).graph
    names = [node.name for node in graph.node]
    for name in ("normalise/Mul", "network/stem/0/Conv", "network/stem/2/Relu", "ArgMax"):
        assert name in names
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    tensors = {tensor.name for tensor in graph.initializer}
    assert {"network.stem.0.weight", "network.stem.0.bias", "network.head.bias"} <= tensors
    assert len(set(names)) == len(names)


def test_the_metadata_holds_the_spec_and_what_goes_in_and_out(spec: Spec, tiny_file: Path) -> None:
    model = onnx.load(str(tiny_file))
    found = {entry.key: entry.value for entry in model.metadata_props}
    assert Spec.model_validate(json.loads(found["srdeploy.spec"])) == spec
    assert (found["srdeploy.input"], found["srdeploy.output"]) == ("uint8", "labels")
    assert found["srdeploy.network"] == "{}"
    assert [(o.domain, o.version) for o in model.opset_import] == [("", OPSET)]
    axes = [axis.dim_param or axis.dim_value for axis in _dims(model.graph.input[0])]
    assert axes == ["N", "H", "W", 3]
    assert [axis.dim_param for axis in _dims(model.graph.output[0])] == ["N", "H", "W"]


@pytest.mark.parametrize(
    ("name", "input", "output"), [("unet", "uint8", "both"), ("tiny", "float32", "logits")]
)
def test_onnxruntime_gives_what_torch_gives_at_sizes_that_were_not_traced(
    tmp_path: Path,
    spec: Spec,
    randomised: Randomise,
    name: str,
    input: InputKind,
    output: OutputKind,
) -> None:
    network = randomised(make_network(name, 3, width=4), 2)
    module = Deployable(network, spec, input=input, output=output).eval()
    export_onnx(module, spec, tmp_path / "m.onnx", input=input, output=output)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    for shape in ((1, 33, 47, 3), (3, 50, 32, 3)):
        images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        feed = images if input == "uint8" else normalise(images, spec)
        with torch.inference_mode():
            expected = module(torch.from_numpy(feed))
        expected = expected if isinstance(expected, tuple) else (expected,)
        found = session.run(None, {"images": feed})
        assert len(found) == len(expected)
        np.testing.assert_allclose(found[-1], expected[-1].numpy(), atol=1e-4)
        if output == "both":
            np.testing.assert_array_equal(found[0], expected[0].numpy())


def test_exporting_leaves_the_module_as_it_was_and_the_terminal_alone(
    tmp_path: Path, spec: Spec, tiny: type[nn.Module], capfd: pytest.CaptureFixture[str]
) -> None:
    module = Deployable(tiny(), spec).train()
    module.network.get_submodule("body").eval()
    modes = {name: part.training for name, part in module.named_modules()}
    state = {name: value.clone() for name, value in module.state_dict().items()}
    random = torch.random.get_rng_state()
    export_onnx(module, spec, tmp_path / "m.onnx")
    assert {name: part.training for name, part in module.named_modules()} == modes
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert capfd.readouterr() == ("", "")


class Choosing(nn.Module):
    """Takes a different way for bright images: no graph can hold both."""

    def forward(self, images: Tensor) -> Tensor:
        return images if images.mean() > 0.5 else -images


def test_a_network_that_cannot_be_traced_is_refused_in_one_line(tmp_path: Path, spec: Spec) -> None:
    path = tmp_path / "m.onnx"
    with pytest.raises(UserError, match=r"Deployable can't be exported to ONNX: .+"):
        export_onnx(Deployable(Choosing(), spec), spec, path)
    assert list(tmp_path.iterdir()) == []


def _dims(value: onnx.ValueInfoProto) -> list[onnx.TensorShapeProto.Dimension]:
    return list(value.type.tensor_type.shape.dim)
