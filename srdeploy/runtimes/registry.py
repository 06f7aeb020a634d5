"""Which runtime opens which artifact: the one place that knows all backends."""

from pathlib import Path

from srdeploy.artifacts.artifact import Artifact, open_artifact
from srdeploy.errors import UserError
from srdeploy.graph.signature import check_class_count, spec_for_graph
from srdeploy.runtimes.base import Runtime, parse_device
from srdeploy.spec import Spec
from srdeploy.validation import closest

RUNTIMES = ("auto", "torch", "onnxruntime", "onnxruntime-tensorrt", "openvino", "tensorrt")
"""auto: torch for a run, onnxruntime for a graph, tensorrt for an engine."""


def open_runtime(
    path: Path | str,
    device: str = "cpu",
    runtime: str = "auto",
    spec: Spec | None = None,
    threads: int | None = None,
    precision: str | None = None,
) -> Runtime:
    """The runtime for a run folder, a deploy folder, an .onnx or an .engine file.

    It is not open yet. device: cpu, cuda or cuda:N. runtime: one of RUNTIMES. spec: for ONNX files
    that carry none. threads: CPU threads [all cores]. precision: of OpenVINO's arithmetic, fp32
    [default], bf16 or fp16; elsewhere the artifact's types decide. Raises UserError where artifact,
    runtime, device or their combination can't be used; nothing falls back to something else.
    """
    artifact = open_artifact(Path(path))
    name = choose_runtime(artifact, runtime)
    _require_device(name, device, threads)
    if precision is not None and name != "openvino":
        raise UserError(
            f"--precision {precision}: {name} computes what the types in {path} say; OpenVINO "
            "alone has a choice (--runtime openvino), elsewhere export with --precision"
        )
    if name == "tensorrt":
        from srdeploy.runtimes.trt.compatibility import engine_for

        artifact = engine_for(artifact, parse_device(device)[1])
        from srdeploy.runtimes.trt.runtime import TensorRTRuntime

        return TensorRTRuntime(artifact, _resolve_spec(artifact, spec), device)
    own = _resolve_spec(artifact, spec)
    if name == "torch":
        from srdeploy.runtimes.torch_runtime import TorchRuntime

        return TorchRuntime(artifact, own, device, threads)
    if name == "openvino":
        from srdeploy.runtimes.openvino_runtime import OpenVINORuntime

        return OpenVINORuntime(artifact, own, device, threads, precision)
    from srdeploy.runtimes.onnx_runtime import OnnxRuntime

    return OnnxRuntime(artifact, own, device, threads, tensorrt=name == "onnxruntime-tensorrt")


def choose_runtime(artifact: Artifact, runtime: str) -> str:
    """The runtime, auto resolved. Raises UserError where it can't run such an artifact."""
    if runtime not in RUNTIMES:
        raise UserError(f"unknown runtime '{runtime}': {closest(runtime, RUNTIMES)}")
    path, kind = artifact.path, artifact.kind
    if runtime == "auto":
        return {"run": "torch", "engine": "tensorrt"}.get(kind, "onnxruntime")
    if kind == "run" and runtime != "torch":
        engine = " --trt" if runtime == "tensorrt" else ""
        raise UserError(
            f"{path} is a run folder, which torch runs: for {runtime}, export it first "
            f"(srdeploy export {path}{engine})"
        )
    if kind == "engine" and runtime != "tensorrt":
        raise UserError(
            f"{path} is a TensorRT engine, which tensorrt runs: for {runtime}, give the "
            f"{'run folder' if runtime == 'torch' else 'graph that it was built from'}"
        )
    if kind in ("deploy", "onnx") and runtime == "torch":
        raise UserError(
            f"{path} holds an ONNX graph, which onnxruntime runs: for torch, give the run folder"
        )
    if kind == "onnx" and runtime == "tensorrt":
        raise UserError(
            f"{path} is a graph and not an engine: build one (srdeploy export RUN --trt), or use "
            "--runtime onnxruntime-tensorrt"
        )
    return runtime


def _require_device(runtime: str, device: str, threads: int | None) -> None:
    """Raises UserError where `runtime` does not run on `device`."""
    kind, _ = parse_device(device)
    if kind == "cpu" and runtime in ("tensorrt", "onnxruntime-tensorrt"):
        raise UserError(f"{runtime} runs on an NVIDIA GPU: use --device cuda")
    if kind == "cuda" and runtime == "openvino":
        raise UserError(
            f"openvino runs on the CPU here, not on {device}: use --device cpu, or --runtime "
            "onnxruntime or tensorrt for the GPU"
        )
    if threads is not None and runtime == "tensorrt":
        raise UserError("--threads sets threads of the CPU, and a TensorRT engine uses none")


def _resolve_spec(artifact: Artifact, given: Spec | None) -> Spec:
    own = artifact.spec
    if given is None:
        if own is None:
            raise UserError(
                f"{artifact.path} carries no srdeploy metadata (key 'srdeploy.spec'): "
                "say what its classes are with --classes classes.json"
            )
        return own
    if own is not None and own != given:
        raise UserError(
            f"{artifact.path} has its own classes and pre-processing, and others were given: "
            "leave --classes away"
        )
    if artifact.signature is not None:
        check_class_count(artifact.signature.classes, given, artifact.path)
        if own is None:
            return spec_for_graph(given, artifact.signature)
    return given
