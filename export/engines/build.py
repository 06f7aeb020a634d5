"""What TensorRT says while it parses and builds, and what that means."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from srdeploy.artifacts.artifact import Builder, EngineSidecar, Profile, engine_name, write_sidecar
from srdeploy.errors import UserError
from srdeploy.export.engines.profiles import check_profiles, profiles_of
from srdeploy.export.engines.read_back import (
    count_types,
    engine_types,
    network_types,
    require_agreement,
)
from srdeploy.files import explain_os_error, sha256_of, write_whole
from srdeploy.graph.signature import Signature, read_signature
from srdeploy.precision import Precision
from srdeploy.runtimes.gpus import Gpu, cuda_driver_version, list_gpus
from srdeploy.runtimes.trt.engine import collecting_logger, import_tensorrt
from srdeploy.validation import Settings

_MEMORY = (
    "could not find any implementation",
    "out of memory",
    "outofmemory",
    "cudaerrormemoryallocation",
    "insufficient memory",
    "insufficient workspace",
    "no space left",
)
_NO_GPU = (
    "cuda initialization failure",
    "cudaerrornodevice",
    "no cuda-capable device",
    "cudaerrorinsufficientdriver",
    "cuda_error_no_device",
    "driver version is insufficient",
    "unable to determine gpu",
)
"""Parts of TensorRT's own messages, in lower case."""
_LONGEST = 300
"""Characters of a message that are shown."""


def warnings_of(logger: Any) -> list[str]:
    """The warnings so far, each once."""
    return list(dict.fromkeys(message.text for message in logger.messages if message.warning))


def explain_failure(logger: Any, what: str) -> UserError:
    """One line for a build of `what` that TensorRT gave up, from what it logged."""
    errors = [message.text for message in logger.messages if message.error]
    said = " ".join(errors).lower()
    first = _short(errors[0]) if errors else "it gives no reason"
    if any(part in said for part in _NO_GPU):
        return UserError(
            f"{what}: TensorRT finds no usable NVIDIA GPU or driver ({first}): build on the "
            "machine that will run it, or ahead of time with --builder rtx --sm 8.9"
        )
    if any(part in said for part in _MEMORY):
        return UserError(
            f"{what}: TensorRT found no kernel that fits, which is probably a matter of memory "
            f"({first}): raise workspace, free the GPU, or give a smaller profile"
        )
    return UserError(f"{what}: TensorRT can't build it ({first})")


def explain_parser(parser: Any, what: str) -> UserError:
    """One line for a graph that TensorRT's parser refused: node, operator and reason."""
    faults = [_fault(parser.get_error(index)) for index in range(parser.num_errors)]
    if not faults:
        return UserError(f"{what}: TensorRT does not parse it, and gives no reason")
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return UserError(f"{what}: TensorRT does not take {faults[0]}{more}")


def _fault(error: Any) -> str:
    node = error.node_name() or f"number {error.node()}"
    operator = error.node_operator()
    where = f"node {node} ({operator})" if operator else "the graph"
    return f"{where}: {_short(error.desc())}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."


# Parsing


@dataclass(frozen=True)
class Parsed:
    """A strongly typed network, and what must live as long as it."""

    trt: Any
    """The package."""
    path: Path
    logger: Any
    builder: Any
    network: Any
    parser: Any
    """It owns the weights."""


def parse_onnx(path: Path, kind: Builder) -> Parsed:
    """Parses `path` with its side files.

    Every tensor's type is the graph's (strongly typed): in TensorRT 11 there is nothing else, 10
    is told so. Raises MissingPackageError, and UserError naming the first node that TensorRT does
    not take.
    """
    trt = import_tensorrt(kind)
    logger = collecting_logger(trt)
    try:
        builder = trt.Builder(logger)
    except (TypeError, RuntimeError) as error:  # what pybind11 makes of a null pointer
        raise explain_failure(logger, str(path)) from error
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        raise explain_parser(parser, str(path))
    if network.num_inputs != 1:
        raise UserError(f"{path}: one input (the images) is expected, not {network.num_inputs}")
    return Parsed(trt, path, logger, builder, network, parser)


# Compute capabilities (TensorRT for RTX)

RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
_WITHOUT_TF32 = ("7.5",)
"""Older than the units for tf32 and bf16."""


def require_target(capability: str, precision: Precision) -> None:
    """Raises ValueError where TensorRT for RTX does not build for it, or not in that precision."""
    if capability not in RTX_CAPABILITIES:
        raise ValueError(
            f"compute capability {capability} is no target of TensorRT for RTX, which builds for "
            + ", ".join(RTX_CAPABILITIES)
        )
    if capability in _WITHOUT_TF32 and precision in ("tf32", "bf16"):
        raise ValueError(
            f"compute capability {capability}: such GPUs do not compute in {precision}"
        )


def set_targets(trt: Any, config: Any, targets: Sequence[str]) -> None:
    """Makes `config` build for them. Raises UserError where this version can't."""
    config.num_compute_capabilities = len(targets)
    known = trt.ComputeCapability.__members__
    for index, target in enumerate(targets):
        member = known.get(f"SM{target.replace('.', '')}")
        if member is None or not config.set_compute_capability(member, index):
            raise UserError(
                f"TensorRT for RTX {trt.__version__} can't build for compute capability {target}: "
                "install a newer tensorrt-rtx"
            )


# Timing cache


def attach_timing_cache(config: Any, path: Path | None) -> Any:
    """The cache in `path`, or an empty one where there is no such file, attached to `config`; None
    for no path.

    Raises UserError where it was measured on another GPU or version, whose timings mislead.
    """
    if path is None:
        return None
    try:
        stored = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise explain_os_error(error, path) from error
    cache = config.create_timing_cache(stored)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise UserError(
            f"{path} is no timing cache of this TensorRT on this GPU: give another timing_cache"
        )
    return cache


def save_timing_cache(cache: Any, path: Path) -> None:
    """Writes it whole."""
    write_whole(path, bytes(cache.serialize()))


# From an ONNX file to a TensorRT engine: one path for TensorRT 10 and 11, and for TensorRT for
# RTX, which builds ahead of time.


class BuildOptions(Settings):
    """How an engine is built."""

    builder: Builder = "tensorrt"
    precision: Precision = "fp32"
    """What the graph's types must turn out to be; tf32 is the builder's own."""
    sm: tuple[str, ...] = ()
    """rtx: compute capabilities to build for, ahead of time. None: this machine's GPU."""
    profiles: tuple[Profile, ...] = ()
    """None: from the sizes in the graph's spec, batch 1."""
    workspace_gib: float | None = Field(default=None, gt=0)
    """Memory that kernels may scratch in; None: all of the GPU's."""
    timing_cache: Path | None = None
    """Read and written: the next build measures nothing twice."""
    refittable: bool = False
    """Whether the engine takes other weights without a build."""
    optimization_level: int | None = Field(default=None, ge=0, le=5)
    """How long TensorRT searches; None: as it does by default (3)."""
    command: str = ""
    """Builds it again; for the sidecar."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.builder == "tensorrt":
            if self.sm:
                raise ValueError(
                    "--sm goes only with --builder rtx: TensorRT proper builds on the GPU that "
                    "the engine is for"
                )
            return self
        if self.timing_cache is not None:
            raise ValueError(
                "timing_cache goes only with TensorRT proper: TensorRT for RTX measures nothing"
            )
        for capability in self.sm:
            require_target(capability, self.precision)
        if len(set(self.sm)) != len(self.sm):
            raise ValueError(f"a compute capability stands twice among {', '.join(self.sm)}")
        return self


@dataclass(frozen=True)
class BuiltPlan:
    """A serialized engine, and what is known of how it was built."""

    content: bytes
    types: dict[str, str]
    """Name -> type of the network's weighted layers."""
    warnings: list[str]
    tf32_allowed: bool
    seconds: float


def build_engine(onnx: Path, engine: Path, options: BuildOptions) -> EngineSidecar:
    """Builds `engine` from `onnx` and writes it, and its sidecar, whole.

    Raises MissingPackageError, and UserError: no GPU or driver, an operator that TensorRT lacks,
    too little memory, a profile that the graph can't take, or types of the layers that are not
    those of `options.precision`. Nothing is written then.
    """
    signature = read_signature(onnx)
    if signature.spec is None:
        raise UserError(
            f"{onnx} has no spec in it: attach one with srdeploy strip --classes, and build from "
            "the result"
        )
    profiles = options.profiles or profiles_of(signature.spec)
    check_profiles(profiles, signature, signature.spec, onnx)
    gpu = target_gpu(options)
    parsed = parse_onnx(onnx, options.builder)
    plan = build_plan(parsed, signature, profiles, options, gpu)
    types = plan.types
    figures = {
        "seconds": round(plan.seconds, 2),
        "tf32_allowed": plan.tf32_allowed,
        "warnings": plan.warnings,
    }
    if options.builder == "tensorrt":
        # A plan of TensorRT for RTX holds no kernels yet: they are chosen on the GPU that runs it.
        types, found = _inspect(parsed, plan)
        figures |= found
        require_agreement(options.precision, types, onnx)
    write_whole(engine, plan.content)
    sidecar = EngineSidecar(
        builder=options.builder,
        builder_version=str(parsed.trt.__version__),
        compute_capabilities=capabilities(options, gpu),
        gpu=None if gpu is None else gpu.name,
        cuda_driver=None if gpu is None else cuda_driver_version(),
        precision=options.precision,
        layer_types=count_types(types),
        read_from="engine" if options.builder == "tensorrt" else "network",
        profiles=profiles,
        refittable=options.refittable,
        engine_sha256=sha256_of(engine),
        engine_bytes=len(plan.content),
        onnx=onnx.name,
        onnx_sha256=sha256_of(onnx),
        command=options.command,
        spec=signature.spec,
        signature=signature,
        figures=figures,
    )
    write_sidecar(engine, sidecar)
    return sidecar


def target_gpu(options: BuildOptions) -> Gpu | None:
    """This machine's GPU where the engine is for it, None ahead of time. Raises UserError without
    one."""
    if options.sm:
        return None
    ahead = "or build ahead of time, without one: --builder rtx --sm 8.9"
    try:
        gpus = list_gpus()
    except UserError as error:
        raise UserError(f"an engine for this machine's GPU can't be built: {error}; {ahead}") from (
            error
        )
    if not gpus:
        raise UserError(
            "an engine for this machine's GPU can't be built: CUDA sees no GPU; build on the "
            f"machine that will run it, {ahead}"
        )
    if options.builder == "rtx":
        try:
            require_target(gpus[0].compute_capability, options.precision)
        except ValueError as error:
            raise UserError(f"{gpus[0].name}: {error}") from error
    return gpus[0]


def capabilities(options: BuildOptions, gpu: Gpu | None) -> tuple[str, ...]:
    """The compute capabilities that the engine runs on."""
    return options.sm if gpu is None else (gpu.compute_capability,)


def target_name(options: BuildOptions, stem: str = "model") -> str:
    """File name of an engine of `options`, e.g. model.nvidia-l4.engine. Raises as target_gpu."""
    gpu = target_gpu(options)
    return engine_name(None if gpu is None else gpu.name, capabilities(options, gpu), stem)


def build_plan(
    parsed: Parsed,
    signature: Signature,
    profiles: tuple[Profile, ...],
    options: BuildOptions,
    gpu: Gpu | None,
) -> BuiltPlan:
    """Builds a parsed network whose layers have the types of `options.precision`.

    Raises UserError where they have others, and where TensorRT gives up.
    """
    trt, path = parsed.trt, parsed.path
    types = network_types(trt, parsed.network)
    require_agreement(options.precision, types, path)
    if options.refittable and options.builder == "rtx" and gpu is None:
        raise UserError(
            f"{path}: TensorRT for RTX builds refittable engines only on a machine with a GPU: "
            "leave out refittable, or leave out --sm there"
        )
    config = _configured(parsed, options, gpu)
    cache = attach_timing_cache(config, options.timing_cache)
    for profile in profiles:
        _add_profile(parsed, config, profile, signature)
    start = time.perf_counter()
    serialized = parsed.builder.build_serialized_network(parsed.network, config)
    if serialized is None:
        raise explain_failure(parsed.logger, str(path))
    seconds = time.perf_counter() - start
    if cache is not None and options.timing_cache is not None:
        save_timing_cache(cache, options.timing_cache)
    return BuiltPlan(
        content=bytes(serialized),
        types=types,
        warnings=warnings_of(parsed.logger),
        tf32_allowed=config.get_flag(trt.BuilderFlag.TF32),
        seconds=seconds,
    )


def _configured(parsed: Parsed, options: BuildOptions, gpu: Gpu | None) -> Any:
    trt = parsed.trt
    config = parsed.builder.create_builder_config()
    if options.precision == "tf32":
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)  # it is on by default
    if options.workspace_gib is not None:
        limit = round(options.workspace_gib * 2**30)
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, limit)
    if options.refittable:
        config.set_flag(trt.BuilderFlag.REFIT)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.builder == "tensorrt":
        # Else the engine holds only its layers' names, and no types to read back.
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    else:
        set_targets(trt, config, capabilities(options, gpu))
    return config


def _add_profile(parsed: Parsed, config: Any, profile: Profile, signature: Signature) -> None:
    """Raises UserError where TensorRT refuses it."""
    optimization_profile = parsed.builder.create_optimization_profile()
    shapes = [
        input_shape(shape, signature)
        for shape in (profile.smallest, profile.usual, profile.largest)
    ]
    optimization_profile.set_shape(parsed.network.get_input(0).name, *shapes)
    if not optimization_profile or config.add_optimization_profile(optimization_profile) < 0:
        raise UserError(f"{parsed.path} can't take the profile {profile.text()}")


def input_shape(shape: tuple[int, int, int], signature: Signature) -> tuple[int, int, int, int]:
    """(N, H, W) in the graph's own layout."""
    batch, height, width = shape
    return (batch, height, width, 3) if signature.input == "uint8" else (batch, 3, height, width)


def _inspect(parsed: Parsed, plan: BuiltPlan) -> tuple[dict[str, str], dict[str, Any]]:
    """Layer -> type in the engine as it is loaded, and figures of it."""
    trt = parsed.trt
    runtime = trt.Runtime(parsed.logger)
    engine = runtime.deserialize_cuda_engine(plan.content)
    if engine is None:
        raise explain_failure(parsed.logger, f"the engine built from {parsed.path}")
    types = engine_types(trt, engine, plan.types)
    return types, {
        "layers": engine.num_layers,
        "device_memory_bytes": engine.device_memory_size_v2,
        "weighted_layers_in_the_graph": len(plan.types),
    }
