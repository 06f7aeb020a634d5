"""Whether `srdeploy bench` sees a leftover: an export against itself plus one 1x1 convolution.

    python benchmarks/one_convolution.py deploy/baseline backbone.features.1 --out one.json

The convolution reads the features of a stage, as an exit's first layer does, and has an exit's
width. Its result is an output of the graph, or onnxruntime would leave it out. The labels are the
same; the latency must come out DIFFERENT.
"""

import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import typer
from journal import Journal, without_runs
from onnx import ModelProto, TensorProto, helper, numpy_helper, shape_inference

from srdeploy.environment import describe_environment
from srdeploy.files import write_json

WIDTH = 64
"""Channels of an exit, as RegulationConfig has them by default."""


def with_convolution(model: ModelProto, stage: str) -> ModelProto:
    """The graph with a 1x1 convolution on the output of the module `stage` (a dotted path)."""
    prefix = "network/" + stage.replace(".", "/") + "/"
    features = [node.output[0] for node in model.graph.node if node.name.startswith(prefix)][-1]
    inferred = shape_inference.infer_shapes(model)
    (value,) = (one for one in inferred.graph.value_info if one.name == features)
    channels = value.type.tensor_type.shape.dim[1].dim_value
    kernel = np.random.default_rng(0).normal(size=(WIDTH, channels, 1, 1)).astype(np.float32)
    changed = ModelProto()
    changed.CopyFrom(model)
    changed.graph.initializer.append(numpy_helper.from_array(kernel, "left_over.weight"))
    changed.graph.node.append(
        helper.make_node("Conv", [features, "left_over.weight"], ["left_over"], name="left_over")
    )
    changed.graph.output.append(
        helper.make_tensor_value_info("left_over", TensorProto.FLOAT, [None, WIDTH, None, None])
    )
    return changed


def main(
    deploy: Annotated[Path, typer.Argument(help="A deploy folder.")],
    stage: Annotated[str, typer.Argument(help="Dotted path of an early stage's module.")],
    budget: Annotated[float, typer.Option(help="Seconds of the benchmark.")] = 150,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("one-convolution.json"),
) -> None:
    """Benchmark an export against itself with one convolution added."""
    file = deploy / "model.onnx"
    if not file.is_file():
        raise SystemExit(f"no such export: {file}: nothing was measured")
    journal = Journal()
    with tempfile.TemporaryDirectory(prefix="srdeploy-") as name:
        added = Path(name) / "one-convolution-more.onnx"
        onnx.save(with_convolution(onnx.load(str(file)), stage), str(added))
        words = ("bench", file, added, "--no-exits-left-in", "--budget", str(budget))
        report: dict[str, Any] = journal.run(*words)
    write_json(out, {"environment": describe_environment(), "bench": without_runs(report)})
    verdict = report["cells"][0]["rows"][1]["end_to_end"]["verdict"]
    print(f"{verdict['outcome']}: {verdict['reason']}")


if __name__ == "__main__":
    typer.run(main)
