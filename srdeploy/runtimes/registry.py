"""Which runtime opens which artifact: one table with a row for each backend.

A new backend is one file, with a `Runtime` in it, and one row here. This module loads nothing
heavy: the command line's help reads the table.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srdeploy.errors import UserError

if TYPE_CHECKING:
    from srdeploy.artifacts.artifact import Artifact
    from srdeploy.runtimes.base import Runtime
    from srdeploy.spec import Spec


@dataclass(frozen=True)
class Backend:
    """What the rest of the project needs to know of one runtime."""

    loader: str
    """MODULE:CLASS of the Runtime, imported when it is first opened. It is called with (artifact,
    spec, device), and with `threads` and `precision` where the row says that it takes them."""
    runs: Mapping[str, str]
    """Kinds of artifact (run, deploy, onnx, engine) -> none ("") where it runs them, or why not."""
    devices: Mapping[str, str]
    """cpu and cuda -> none ("") where it runs there, or why not."""
    kserve_platform: str
    """PROJECT_FORMAT, as KServe's protocol has it."""
    packages: tuple[str, ...]
    """Distributions that it needs, for reports about the machine."""
    library: str
    """MODULE:FUNCTION that imports what other people wrote, so that its time can be measured. It is
    called with the builder of the engine, None for what is no engine."""
    pick: str | None = None
    """MODULE:FUNCTION (artifact, device index) -> the artifact that runs on that device, where a
    folder may hold several."""
    precisions: tuple[str, ...] = ()
    """What --precision may choose. Empty: it computes what the types in the file say."""
    takes_threads: bool = True
    """Whether CPU threads can be set."""
    converts: bool = True
    """Whether it runs ONNX graphs, so that benchmarks can convert one for it."""

    @property
    def runs_on(self) -> tuple[str, ...]:
        """The kinds of device that it runs on."""
        return tuple(device for device, refusal in self.devices.items() if not refusal)

    def probe_name(self, name: str, device: str) -> str:
        """The probe of `srdeploy doctor` that runs it on a device: each in its own process."""
        return name if device == self.runs_on[0] else f"{name}-{device}"


_GRAPHS = {"deploy": "", "onnx": ""}
_NO_RUN = (
    "{path} is a run folder, which torch runs: for {runtime}, export it first "
    "(srdeploy export {path}{flag})"
)
_NO_ENGINE = (
    "{path} is a TensorRT engine, which tensorrt runs: for {runtime}, give the graph that it was "
    "built from"
)
_NO_GRAPH = "{path} holds an ONNX graph, which onnxruntime runs: for torch, give the run folder"
_ONLY_GPU = "{runtime} runs on an NVIDIA GPU: use --device cuda"

BACKENDS: dict[str, Backend] = {
    "torch": Backend(
        loader="srdeploy.runtimes.torch_runtime:TorchRuntime",
        runs={
            "run": "",
            "engine": _NO_ENGINE.replace("graph that it was built from", "run folder"),
            "deploy": _NO_GRAPH,
            "onnx": _NO_GRAPH,
        },
        devices={"cpu": "", "cuda": ""},
        kserve_platform="pytorch_safetensors",
        packages=("torch",),
        library="srdeploy.runtimes.torch_runtime:import_library",
        converts=False,
    ),
    "onnxruntime": Backend(
        loader="srdeploy.runtimes.onnx_runtime:OnnxRuntime",
        runs={**_GRAPHS, "run": _NO_RUN, "engine": _NO_ENGINE},
        devices={"cpu": "", "cuda": ""},
        kserve_platform="onnxruntime_onnx",
        packages=("onnxruntime", "onnxruntime-gpu"),
        library="srdeploy.runtimes.onnx_runtime:import_library",
    ),
    "onnxruntime-tensorrt": Backend(
        loader="srdeploy.runtimes.onnx_runtime:OnnxTensorRTRuntime",
        runs={**_GRAPHS, "run": _NO_RUN, "engine": _NO_ENGINE},
        devices={"cpu": _ONLY_GPU, "cuda": ""},
        kserve_platform="onnxruntime_onnx",
        packages=("onnxruntime-gpu",),
        library="srdeploy.runtimes.onnx_runtime:import_library",
    ),
    "openvino": Backend(
        loader="srdeploy.runtimes.openvino_runtime:OpenVINORuntime",
        runs={**_GRAPHS, "run": _NO_RUN, "engine": _NO_ENGINE},
        devices={
            "cpu": "",
            "cuda": "openvino runs on the CPU here, not on {device}: use --device cpu, or "
            "--runtime onnxruntime or tensorrt for the GPU",
        },
        kserve_platform="openvino_onnx",
        packages=("openvino",),
        library="srdeploy.runtimes.openvino_runtime:import_library",
        precisions=("fp32", "bf16", "fp16"),
    ),
    "tensorrt": Backend(
        loader="srdeploy.runtimes.trt.runtime:TensorRTRuntime",
        runs={
            "deploy": "",
            "engine": "",
            "run": _NO_RUN.replace("{flag}", " --trt"),
            "onnx": "{path} is a graph and not an engine: build one (srdeploy export RUN --trt), "
            "or use --runtime onnxruntime-tensorrt",
        },
        devices={"cpu": _ONLY_GPU, "cuda": ""},
        kserve_platform="tensorrt_plan",
        packages=("tensorrt", "tensorrt-rtx", "cuda-python"),
        library="srdeploy.runtimes.trt.runtime:import_library",
        pick="srdeploy.runtimes.trt.compatibility:engine_for",
        takes_threads=False,
        converts=False,
    ),
}
"""All backends by name, in the order in which help and messages list them."""

AUTO = {"run": "torch", "engine": "tensorrt", "deploy": "onnxruntime", "onnx": "onnxruntime"}
"""What `auto` stands for, by the artifact's kind."""


def runtime_names() -> tuple[str, ...]:
    """What --runtime takes: auto and all backends."""
    return ("auto", *BACKENDS)


def choosing_precision() -> tuple[str, ...]:
    """Names of the backends for which --precision chooses the arithmetic."""
    return tuple(name for name, backend in BACKENDS.items() if backend.precisions)


def runtime_packages() -> tuple[str, ...]:
    """All distributions that backends need, each once."""
    names = (name for backend in BACKENDS.values() for name in backend.packages)
    return tuple(dict.fromkeys(names))


def open_runtime(
    path: Path | str,
    device: str = "cpu",
    runtime: str = "auto",
    spec: "Spec | None" = None,
    threads: int | None = None,
    precision: str | None = None,
) -> "Runtime":
    """The runtime for a run folder, a deploy folder, an .onnx or an .engine file.

    It is not open yet. device: cpu, cuda or cuda:N. runtime: auto or one of BACKENDS. spec: for
    ONNX files that carry none. threads: CPU threads [all cores]. precision: the arithmetic, for
    backends that have a choice; for others the artifact's types decide. Raises UserError where
    artifact, runtime, device or their combination can't be used: there are no silent fallbacks.
    """
    from srdeploy.artifacts.artifact import open_artifact

    artifact = open_artifact(Path(path))
    name = choose_runtime(artifact, runtime)
    backend = BACKENDS[name]
    _require_device(name, device)
    artifact = pick_artifact(artifact, name, device)
    options: dict[str, int | str] = {}
    if threads is not None:
        if not backend.takes_threads:
            raise UserError(f"--threads sets threads of the CPU, and {name} uses none")
        options["threads"] = threads
    if precision is not None:
        if not backend.precisions:
            choices = ", ".join(f"--runtime {one}" for one in choosing_precision())
            raise UserError(
                f"--precision {precision}: {name} computes what the types in {path} say; only "
                f"{choices} has a choice, elsewhere export with --precision"
            )
        options["precision"] = precision
    own = _resolve_spec(artifact, spec)
    opened: Runtime = _load(backend.loader)(artifact, own, device, **options)
    return opened


def pick_artifact(artifact: "Artifact", runtime: str, device: str) -> "Artifact":
    """The artifact that `runtime` really opens: of a folder's engines, the one for this GPU.

    runtime: a name, not auto. Raises UserError where none fits the device.
    """
    from srdeploy.runtimes.base import parse_device

    pick = BACKENDS[runtime].pick
    if pick is None:
        return artifact
    picked: Artifact = _load(pick)(artifact, parse_device(device)[1])
    return picked


def import_library(runtime: str, builder: str | None) -> None:
    """Imports the library behind `runtime`. builder: of an engine. Raises MissingPackageError."""
    _load(BACKENDS[runtime].library)(builder)


def _load(place: str) -> Any:
    """What MODULE:NAME names."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def choose_runtime(artifact: "Artifact", runtime: str) -> str:
    """The runtime, auto resolved. Raises UserError where it can't run such an artifact."""
    if runtime == "auto":
        return AUTO[artifact.kind]
    if runtime not in BACKENDS:
        from srdeploy.validation import closest

        raise UserError(f"unknown runtime '{runtime}': {closest(runtime, runtime_names())}")
    refusal = BACKENDS[runtime].runs[artifact.kind]
    if refusal:
        raise UserError(refusal.format(path=artifact.path, runtime=runtime, flag=""))
    return runtime


def _require_device(runtime: str, device: str) -> None:
    """Raises UserError where `runtime` does not run on `device`."""
    from srdeploy.runtimes.base import parse_device

    refusal = BACKENDS[runtime].devices[parse_device(device)[0]]
    if refusal:
        raise UserError(refusal.format(runtime=runtime, device=device))


def _resolve_spec(artifact: "Artifact", given: "Spec | None") -> "Spec":
    from srdeploy.graph.signature import check_class_count, spec_for_graph

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
