"""The runtimes: one table, one row for each backend, and `open_runtime`, which reads it.

A new backend is a subclass of Runtime in a file of its own, and a row here. The command line's help
reads this table, so importing it costs nothing: whatever a function needs, it imports itself.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from srdeploy.errors import MissingPackageError, UserError

if TYPE_CHECKING:
    from srdeploy.artifacts.artifact import Artifact
    from srdeploy.runtimes.base import Runtime
    from srdeploy.spec import Spec

DeviceKind = Literal["cpu", "cuda"]
ArtifactKind = Literal["run", "deploy", "onnx", "engine"]
"""The values of Artifact.kind."""


@dataclass(frozen=True)
class Backend:
    """What the project knows of one runtime without importing it."""

    name: str
    """The name that --runtime takes."""
    label: str
    """Its name in sentences, e.g. "TensorRT"."""
    loader: str
    """Where its Runtime is, as "module:Class"."""
    library: str
    """The Python module that computes."""
    packages: tuple[str, ...]
    """What pip installs for it. `srdeploy doctor` and reports tell their versions."""
    extra: str
    """srdeploy's extra that installs them."""
    devices: tuple[DeviceKind, ...]
    artifacts: tuple[ArtifactKind, ...]
    """What it opens. `auto` takes the first row of the table that opens an artifact."""
    platform: str
    """PROJECT_FORMAT, as the KServe protocol has it."""
    precisions: tuple[str, ...] = ()
    """What --precision may choose, the default first; empty where the artifact decides."""
    threads: bool = True
    """Whether --threads means something."""

    @property
    def runs_graphs(self) -> bool:
        """Whether it opens an ONNX file."""
        return "onnx" in self.artifacts

    def load(self) -> type[Any]:
        """Its Runtime, imported now; its constructor takes (artifact, spec, RuntimeOptions)."""
        module, _, name = self.loader.partition(":")
        return cast(type[Any], getattr(import_module(module), name))


BACKENDS: tuple[Backend, ...] = (
    Backend(
        name="torch",
        label="torch",
        loader="srdeploy.runtimes.torch_runtime:TorchRuntime",
        library="torch",
        packages=("torch",),
        extra="cpu",
        devices=("cpu", "cuda"),
        artifacts=("run",),
        platform="pytorch_safetensors",
    ),
    Backend(
        name="onnxruntime",
        label="onnxruntime",
        loader="srdeploy.runtimes.onnx_runtime:OnnxRuntime",
        library="onnxruntime",
        packages=("onnxruntime", "onnxruntime-gpu"),
        extra="cpu",
        devices=("cpu", "cuda"),
        artifacts=("deploy", "onnx"),
        platform="onnxruntime_onnx",
    ),
    Backend(
        name="onnxruntime-tensorrt",
        label="onnxruntime's TensorRT provider",
        loader="srdeploy.runtimes.onnx_runtime:OnnxTensorRTRuntime",
        library="onnxruntime",
        packages=("onnxruntime-gpu",),
        extra="gpu",
        devices=("cuda",),
        artifacts=("deploy", "onnx"),
        platform="onnxruntime_onnx",
    ),
    Backend(
        name="openvino",
        label="OpenVINO",
        loader="srdeploy.runtimes.openvino_runtime:OpenVINORuntime",
        library="openvino",
        packages=("openvino",),
        extra="openvino",
        devices=("cpu",),
        artifacts=("deploy", "onnx"),
        platform="openvino_onnx",
        precisions=("fp32", "bf16", "fp16"),
    ),
    Backend(
        name="tensorrt",
        label="TensorRT",
        loader="srdeploy.runtimes.trt.runtime:TensorRTRuntime",
        library="tensorrt",
        packages=("tensorrt", "tensorrt-rtx", "cuda-python", "nvidia-ml-py"),
        extra="tensorrt",
        devices=("cuda",),
        artifacts=("deploy", "engine"),
        platform="tensorrt_plan",
        threads=False,
    ),
)


def open_runtime(
    path: Path | str,
    device: str = "cpu",
    runtime: str = "auto",
    spec: "Spec | None" = None,
    threads: int | None = None,
    precision: str | None = None,
) -> "Runtime":
    """The runtime for a run folder, a deploy folder, an .onnx or an .engine file.

    It is not open yet. device: cpu, cuda or cuda:N. runtime: one of runtime_names(). spec: for ONNX
    files that carry none. threads: CPU threads [all cores]. precision: of the arithmetic, where the
    backend has a choice; elsewhere the artifact's types decide. Raises UserError where artifact,
    runtime, device or their combination can't be used; there are no silent fallbacks.
    """
    from srdeploy.artifacts.artifact import open_artifact
    from srdeploy.runtimes.base import RuntimeOptions

    artifact = open_artifact(Path(path))
    backend = find_backend(choose_runtime(artifact, runtime))
    assert backend is not None
    options = RuntimeOptions(device=device, threads=threads, precision=precision)
    _require_device(backend, artifact, device)
    _require_options(backend, artifact, options.threads, options.precision)
    loaded = backend.load()
    artifact = loaded.pick_file(artifact, device)
    opened: Runtime = loaded(artifact, _resolve_spec(artifact, spec), options)
    return opened


def choose_runtime(artifact: "Artifact", runtime: str) -> str:
    """The runtime, auto resolved. Raises UserError where it can't run such an artifact."""
    from srdeploy.validation import closest

    kind = artifact.kind
    usual = next(one for one in BACKENDS if kind in one.artifacts)
    if runtime == "auto":
        return usual.name
    asked = find_backend(runtime)
    if asked is None:
        raise UserError(f"unknown runtime '{runtime}': {closest(runtime, runtime_names())}")
    if kind not in asked.artifacts:
        raise UserError(f"{artifact.path} {_other_artifact(artifact, usual, asked)}")
    return runtime


def find_backend(name: str) -> Backend | None:
    """The row of that name; None for "auto" and for names that are in no row."""
    return next((one for one in BACKENDS if one.name == name), None)


def import_package(name: str) -> Any:
    """The library of that backend, imported now. Raises MissingPackageError with the pip line."""
    backend = find_backend(name)
    assert backend is not None
    try:
        return import_module(backend.library)
    except ImportError as error:
        raise MissingPackageError(backend.library, backend.extra, f"the runtime {name}") from error


def runtime_names() -> tuple[str, ...]:
    """What --runtime takes: auto, then the backends."""
    return ("auto", *(one.name for one in BACKENDS))


def runtime_packages() -> tuple[str, ...]:
    """The packages of all backends, each once."""
    return tuple(dict.fromkeys(package for one in BACKENDS for package in one.packages))


def has_precisions(runtime: str) -> bool:
    """Whether --precision chooses this runtime's arithmetic."""
    backend = find_backend(runtime)
    return backend is not None and bool(backend.precisions)


def runs_graphs(runtime: str) -> bool:
    """Whether this runtime opens an ONNX file; False for "auto", which is no backend."""
    backend = find_backend(runtime)
    return backend is not None and backend.runs_graphs


def runtime_help() -> str:
    """What --runtime takes and what auto means, for help texts."""
    return (
        f"{join_words(runtime_names(), 'or')}; auto goes by the artifact: "
        f"{_usual('run')} for a run, {_usual('onnx')} for a graph, {_usual('engine')} for an engine"
    )


def precision_help() -> str:
    """What --precision chooses, for help texts, e.g. "Arithmetic of A: fp32 (default) or bf16"."""
    return "; ".join(
        f"Arithmetic of {one.label}: "
        + join_words((f"{one.precisions[0]} (default)", *one.precisions[1:]), "or")
        for one in BACKENDS
        if one.precisions
    )


def precision_labels() -> str:
    """The backends with a choice of arithmetic, for sentences."""
    return join_words((one.label for one in BACKENDS if one.precisions), "and")


def join_words(words: Iterable[str], last: str) -> str:
    """E.g. "a, b or c"."""
    *first, end = words
    return f"{', '.join(first)} {last} {end}" if first else end


def _usual(kind: ArtifactKind) -> str:
    return next(one.name for one in BACKENDS if kind in one.artifacts)


def _other_artifact(artifact: "Artifact", usual: Backend, asked: Backend) -> str:
    """What the artifact is, which runtime opens it, and what to give to the one that was asked
    for."""
    if artifact.kind == "run":
        engine = " --trt" if "engine" in asked.artifacts else ""
        return (
            f"is a run folder, which {usual.name} runs: for {asked.name}, export it first "
            f"(srdeploy export {artifact.path}{engine})"
        )
    if artifact.kind == "engine":
        form = "graph that it was built from" if asked.runs_graphs else "run folder"
        return f"is a TensorRT engine, which {usual.name} runs: for {asked.name}, give the {form}"
    if "engine" in asked.artifacts:
        return (
            "is a graph and not an engine: build one (srdeploy export RUN --trt), or use --runtime "
            "onnxruntime-tensorrt"
        )
    return f"holds an ONNX graph, which {usual.name} runs: for {asked.name}, give the run folder"


def _require_device(backend: Backend, artifact: "Artifact", device: str) -> None:
    """Raises UserError where the backend does not run on `device`."""
    from srdeploy.runtimes.base import parse_device

    kind, _ = parse_device(device)
    if kind in backend.devices:
        return
    if kind == "cpu":
        raise UserError(f"{backend.name} runs on an NVIDIA GPU: use --device cuda")
    others = [
        one.name for one in BACKENDS if kind in one.devices and artifact.kind in one.artifacts
    ]
    instead = f", or --runtime {join_words(others, 'or')} for the GPU" if others else ""
    raise UserError(
        f"{backend.name} runs on the CPU here, not on {device}: use --device cpu{instead}"
    )


def _require_options(
    backend: Backend, artifact: "Artifact", threads: int | None, precision: str | None
) -> None:
    """Raises UserError for options that mean nothing to the backend."""
    from srdeploy.validation import closest

    if precision is not None and not backend.precisions:
        choosers = [one for one in BACKENDS if one.precisions]
        have = "has" if len(choosers) == 1 else "have"
        names = join_words((one.name for one in choosers), "or")
        raise UserError(
            f"--precision {precision}: {backend.name} computes what the types in {artifact.path} "
            f"say; only {precision_labels()} {have} a choice (--runtime {names}), elsewhere "
            "export with --precision"
        )
    if precision is not None and precision not in backend.precisions:
        raise UserError(
            f"{backend.label} computes in {join_words(backend.precisions, 'or')}, not in "
            f"'{precision}' ({closest(precision, backend.precisions)}): quantised layers need no "
            "--precision"
        )
    if threads is not None and not backend.threads:
        raise UserError(f"--threads sets threads of the CPU, and {backend.label} uses none")


def _resolve_spec(artifact: "Artifact", given: "Spec | None") -> "Spec":
    """The artifact's own spec, or the one given for an artifact that has none."""
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
        from srdeploy.graph.signature import check_class_count, spec_for_graph

        check_class_count(artifact.signature.classes, given, artifact.path)
        if own is None:
            return spec_for_graph(given, artifact.signature)
    return given
