"""Multiply-accumulates of one run of an artifact: only convolutions and matrix products, whole or
quantised, as `srdeploy.models.cost` counts them in torch.

A graph is run once in onnxruntime, which records the shapes that every layer really met. Shape
inference is not enough: it does not know sizes that the graph itself computes.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from srdeploy.artifacts.artifact import Artifact, read_sidecar
from srdeploy.errors import MissingPackageError
from srdeploy.files import sha256_of
from srdeploy.graph.operators import MULTIPLYING
from srdeploy.graph.signature import Signature
from srdeploy.runs import build_network, leave_out_auxiliary, open_run
from srdeploy.runtimes.onnx_runtime import import_onnxruntime, ort_errors

Shape = Sequence[int]


def artifact_macs(artifact: Artifact, batch: int, size: tuple[int, int]) -> int | None:
    """Multiply-accumulates of one run on images [batch, H, W, 3], size (H, W).

    A run's network is built anew, without its weights; an engine counts as the graph that it was
    built from. None where that graph is not beside the engine, or can't be counted. Raises
    UserError where the run's network can't be built.
    """
    if artifact.kind == "run":
        return _run_macs(artifact.path, batch, size)
    assert artifact.signature is not None
    file = artifact.file
    if artifact.kind == "engine":
        sidecar = read_sidecar(artifact.file)
        file = artifact.file.with_name(sidecar.onnx)
        if not file.is_file() or sha256_of(file) != sidecar.onnx_sha256:
            return None
    return graph_macs(file, artifact.signature, batch, size)


def graph_macs(file: Path, signature: Signature, batch: int, size: tuple[int, int]) -> int | None:
    """Multiply-accumulates of one run of an ONNX graph on images [batch, H, W, 3], size (H, W).

    None where onnxruntime is not installed or can't compute that on a CPU (bfloat16; images that
    the graph does not take, or the memory does not hold), and where the graph holds layers with
    weights that are none of the counted ones.
    """
    if batch <= 2 or signature.shape[0] is not None:
        return _counted(file, signature, batch, size)
    # What a GPU takes at once can be more than the host's memory holds. Layers grow linearly with
    # the batch or, where they see only constants, not at all.
    one, two = (_counted(file, signature, few, size) for few in (1, 2))
    return None if one is None or two is None else one + (batch - 1) * (two - one)


def _counted(file: Path, signature: Signature, batch: int, size: tuple[int, int]) -> int | None:
    total = 0
    events = _profile(file, signature, batch, size)
    if events is None:
        return None
    for event in events:
        kind = event["op_name"]
        if kind in _COUNTED:
            count, left, right = _COUNTED[kind]
            inputs = event["input_type_shape"]
            output = event["output_type_shape"][0]
            total += count(_shape(inputs[left]), _shape(inputs[right]), _shape(output))
        elif any(part in kind for part in MULTIPLYING):
            return None
    return total


def _run_macs(folder: Path, batch: int, size: tuple[int, int]) -> int:
    from srdeploy.models.cost import count_macs
    from srdeploy.models.tracing import PROBE_SIZE

    run = open_run(folder)
    probe = run.spec.input.near(PROBE_SIZE)
    network = build_network(run.network, run.spec.class_count, probe)
    leave_out_auxiliary(network, run.network, probe)
    return batch * count_macs(network.eval(), run.spec.input.padded(size))


def _profile(
    file: Path, signature: Signature, batch: int, size: tuple[int, int]
) -> list[Mapping[str, Any]] | None:
    """What onnxruntime recorded of each layer in one run; None if the run failed."""
    try:
        ort = import_onnxruntime()
    except MissingPackageError:
        return None
    options = ort.SessionOptions()
    options.log_severity_level = 4  # faults arrive as exceptions; the log would repeat them
    # Each layer as in the file: layers that are merged or removed count, too.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Weights that are packed before the first run would be absent from the recorded shapes.
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.enable_profiling = True
    feed = (
        np.zeros((batch, *size, 3), np.uint8)
        if signature.input == "uint8"
        else np.zeros((batch, 3, *size), np.float32)
    )
    with TemporaryDirectory(prefix="srdeploy-") as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        try:
            session = ort.InferenceSession(
                str(file), sess_options=options, providers=["CPUExecutionProvider"]
            )
            session.run(None, {signature.input_name: feed})
        except ort_errors():
            return None
        recorded = Path(session.end_profiling())
        events = json.loads(recorded.read_text())
    return [
        event["args"]
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    ]


def _shape(recorded: Mapping[str, Shape]) -> Shape:
    """The shape in {"float": [1, 3, 32, 32]}."""
    (shape,) = recorded.values()
    return shape


def _convolution(image: Shape, kernel: Shape, output: Shape) -> int:
    """[N, C, ...] with [M, C / groups, ...] to [N, M, ...]: the whole kernel at every position of
    the output."""
    return output[0] * prod(output[2:]) * prod(kernel)


def _transposed(image: Shape, kernel: Shape, output: Shape) -> int:
    """[N, C, ...] with [C, M / groups, ...]: the whole kernel at every position of the image."""
    return image[0] * prod(image[2:]) * prod(kernel)


def _product(left: Shape, right: Shape, output: Shape) -> int:
    """[..., M, C] with [..., C, K] to [..., M, K]."""
    return prod(output) * left[-1]


def _gemm(left: Shape, right: Shape, output: Shape) -> int:
    """[M, C], or transposed, to [M, K]."""
    return prod(left) * output[1]


_COUNTED: dict[str, tuple[Callable[[Shape, Shape, Shape], int], int, int]] = {
    "Conv": (_convolution, 0, 1),
    "ConvInteger": (_convolution, 0, 1),
    "QLinearConv": (_convolution, 0, 3),
    "ConvTranspose": (_transposed, 0, 1),
    "Gemm": (_gemm, 0, 1),
    "MatMul": (_product, 0, 1),
    "MatMulInteger": (_product, 0, 1),
    "QLinearMatMul": (_product, 0, 3),
}
"""Kind of layer -> how it is counted, and which of its inputs are the two that are multiplied."""
