"""Which engine of a deploy folder runs on this machine."""

from srdeploy.errors import UserError
from srdeploy.serve.artifact import ENGINE_SUFFIX, Artifact, open_artifact
from srdeploy.serve.engine_file import EngineSidecar, read_sidecar
from srdeploy.serve.gpus import find_gpu


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
