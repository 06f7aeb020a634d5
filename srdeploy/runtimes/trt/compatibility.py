"""Which engine of a deploy folder runs on this machine."""

from dataclasses import dataclass

from srdeploy.artifacts.artifact import (
    ENGINE_SUFFIX,
    Artifact,
    Builder,
    EngineSidecar,
    open_artifact,
    read_sidecar,
)
from srdeploy.errors import UserError
from srdeploy.runtimes.gpus import cuda_driver_version, find_gpu
from srdeploy.runtimes.trt.engine import import_tensorrt


def engine_for(artifact: Artifact, index: int) -> Artifact:
    """The engine of a deploy folder for the GPU cuda:`index`; an engine itself as it is.

    Of several, one that was built on a GPU of the same name comes first, then the newest file.
    Raises UserError where none was built for this GPU.
    """
    if artifact.kind == "engine":
        return artifact
    folder = artifact.path
    engines = sorted(folder.glob(f"*{ENGINE_SUFFIX}"))
    if not engines:
        raise UserError(
            f"{folder} holds no TensorRT engine: build one on this machine (srdeploy export RUN "
            "--trt), or use --runtime onnxruntime-tensorrt"
        )
    gpu = find_gpu(index)
    sidecars = {engine: read_sidecar(engine) for engine in engines}
    fitting = [
        engine
        for engine, sidecar in sidecars.items()
        if gpu.compute_capability in sidecar.compute_capabilities
    ]
    if not fitting:
        offers = ", ".join(f"{one.name} for {_built_for(sidecars[one])}" for one in engines)
        raise UserError(
            f"no engine in {folder} is for {gpu.name} (compute capability "
            f"{gpu.compute_capability}): it holds {offers}; build one on this machine "
            "(srdeploy export RUN --trt)"
        )
    best = max(fitting, key=lambda one: (sidecars[one].gpu == gpu.name, one.stat().st_mtime_ns))
    return open_artifact(best)


def _built_for(sidecar: EngineSidecar) -> str:
    capabilities = " and ".join(sidecar.compute_capabilities)
    return f"{sidecar.gpu or 'GPUs'} (compute capability {capabilities})"


# Does an engine run on this machine? Asked before TensorRT, which says no more than that it can't
# deserialise it.

BUILDER_NAMES: dict[Builder, str] = {"tensorrt": "TensorRT", "rtx": "TensorRT for RTX"}


@dataclass(frozen=True)
class EngineHost:
    """What an engine is bound to, as this machine has it."""

    gpu: str
    compute_capability: str
    """E.g. "8.9"."""
    builder: Builder
    builder_version: str
    """Of the installed package."""
    cuda_driver: str
    """Newest CUDA version that the driver runs, e.g. "13.0"."""


def engine_host(builder: Builder, index: int = 0) -> EngineHost:
    """This machine, as an engine of `builder` on the GPU cuda:`index` meets it.

    Raises MissingPackageError without the builder's package or CUDA's, UserError without a driver
    or that GPU.
    """
    version = str(import_tensorrt(builder).__version__)
    gpu = find_gpu(index)
    return EngineHost(
        gpu=gpu.name,
        compute_capability=gpu.compute_capability,
        builder=builder,
        builder_version=version,
        cuda_driver=cuda_driver_version(),
    )


def check_fits(sidecar: EngineSidecar, here: EngineHost) -> None:
    """Raises UserError where the engine can't run on `here`: the fields that differ, and the
    command that builds it again.

    A plan of TensorRT runs on the compute capability that it was built on, with the version that
    built it; one of TensorRT for RTX on the capabilities that it was built for. Neither is built
    to be compatible with more.
    """
    differences = [
        f"{field}: built for {built}, here {found}"
        for field, built, found in _differences(sidecar, here)
    ]
    if differences:
        raise UserError(
            f"the engine built from {sidecar.onnx} does not run on this machine ("
            + "; ".join(differences)
            + f"). Build it here: {sidecar.command}"
        )


def _differences(sidecar: EngineSidecar, here: EngineHost) -> list[tuple[str, str, str]]:
    found = []
    if sidecar.builder != here.builder:
        names = BUILDER_NAMES[sidecar.builder], BUILDER_NAMES[here.builder]
        return [("builder", *names)]
    if _bound(sidecar.builder, sidecar.builder_version) != _bound(
        here.builder, here.builder_version
    ):
        name = BUILDER_NAMES[here.builder]
        found.append((f"{name} version", sidecar.builder_version, here.builder_version))
    if here.compute_capability not in sidecar.compute_capabilities:
        built = " and ".join(sidecar.compute_capabilities)
        built += "" if sidecar.gpu is None else f" ({sidecar.gpu})"
        found.append(("compute capability", built, f"{here.compute_capability} ({here.gpu})"))
    if sidecar.cuda_driver is not None and _major(here.cuda_driver) < _major(sidecar.cuda_driver):
        found.append(("CUDA version of the driver", sidecar.cuda_driver, here.cuda_driver))
    return found


def _bound(builder: Builder, version: str) -> str:
    """The part of a version that a plan is bound to."""
    return version if builder == "rtx" else ".".join(version.split(".")[:3])


def _major(version: str) -> int:
    return int(version.split(".")[0])
