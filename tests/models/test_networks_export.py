"""Every network becomes an ONNX graph with dynamic sizes that computes the same in onnxruntime."""

import json
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.export import Dim

from srdeploy.models import NETWORKS, make_network

SMALL: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "small_networks.json").read_text()
)
WITHOUT_TENSORRT = {"MaxUnpool", "ScatterND", "ScatterElements", "GatherND", "Loop", "If"}


def exported(network: nn.Module, path: Path) -> onnx.ModelProto:
    program = torch.onnx.export(
        network,
        (torch.randn(2, 3, 64, 96),),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: Dim("N"), 2: Dim("H", min=32), 3: Dim("W", min=32)},),
        external_data=False,
        verbose=False,
    )
    assert program is not None
    program.save(path)
    return onnx.load(path)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_the_exported_graph_equals_the_network_at_sizes_and_batches_it_never_saw(
    name: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = make_network(name, 5, **SMALL[name]).eval()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None
            assert part.running_var is not None
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 2)
    model = exported(network, tmp_path / "network.onnx")
    operators = {node.op_type for node in model.graph.node}
    assert operators & WITHOUT_TENSORRT == set()
    pools = [node for node in model.graph.node if node.op_type == "MaxPool"]
    assert all(len(pool.output) == 1 for pool in pools)  # TensorRT gives no indices
    session = onnxruntime.InferenceSession(
        tmp_path / "network.onnx", providers=["CPUExecutionProvider"]
    )
    for shape in [(1, 3, 97, 131), (3, 3, 97, 131), (1, 3, 32, 33), (1, 3, 64, 64)]:
        images = torch.randn(shape)
        with torch.inference_mode():
            expected = network(images)
        (found,) = session.run(None, {"images": images.numpy()})
        scale = float(expected.abs().max())
        torch.testing.assert_close(
            torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5 * max(scale, 1e-2)
        )
