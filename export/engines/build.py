"""From an ONNX file to a TensorRT engine: one path for TensorRT 10 and 11, and for TensorRT for
RTX, which builds ahead of time."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from srdeploy.errors import UserError
from srdeploy.export.engines.messages import explain_failure, warnings_of
from srdeploy.export.engines.parsed import Parsed, parse_onnx
from srdeploy.export.engines.profiles import check_profiles, profiles_of
from srdeploy.export.engines.read_back import (
    count_types,
    engine_types,
    network_types,
    require_agreement,
)
from srdeploy.export.engines.rtx_targets import require_target, set_targets
from srdeploy.export.engines.timing_cache import attach_timing_cache, save_timing_cache
from srdeploy.files import sha256_of, write_whole
from srdeploy.precision import Precision
from srdeploy.serve.engine_file import (
    Builder,
    EngineSidecar,
    Profile,
    engine_name,
    write_sidecar,
)
from srdeploy.serve.gpus import Gpu, cuda_driver_version, list_gpus
from srdeploy.serve.signature import Signature, read_signature
from srdeploy.validation import Settings


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
                    "--sm goes with --builder rtx alone: TensorRT proper builds on the GPU that "
                    "the engine is for"
                )
            return self
        if self.timing_cache is not None:
            raise ValueError(
                "--timing-cache goes with TensorRT proper alone: TensorRT for RTX measures nothing"
            )
        for capability in self.sm:
            require_target(capability, self.precision)
        if len(set(self.sm)) != len(self.sm):
            raise ValueError(f"a compute capability stands twice among {', '.join(self.sm)}")
        return self


@dataclass(frozen=True)
class Plan:
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
) -> Plan:
    """Builds a parsed network whose layers have the types of `options.precision`.

    Raises UserError where they have others, and where TensorRT gives up.
    """
    trt, path = parsed.trt, parsed.path
    types = network_types(trt, parsed.network)
    require_agreement(options.precision, types, path)
    if options.refittable and options.builder == "rtx" and gpu is None:
        raise UserError(
            f"{path}: TensorRT for RTX builds refittable engines on a machine with a GPU alone: "
            "leave out --refittable, or leave out --sm there"
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
    return Plan(
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
        # Else the engine holds its layers' names alone, and no types to read back.
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


def _inspect(parsed: Parsed, plan: Plan) -> tuple[dict[str, str], dict[str, Any]]:
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
