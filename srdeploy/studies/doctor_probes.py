"""The tiny graph and photo that `srdeploy doctor` tries everything on."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from srdeploy.errors import MissingPackageError, UserError
from srdeploy.runtimes.registry import BACKENDS, Backend, DeviceKind

if TYPE_CHECKING:
    from srdeploy.spec import Spec

SIZE = (32, 32)
"""(height, width) of the photo."""


def tiny_spec() -> "Spec":
    """Three classes, one size."""
    from srdeploy.spec import InputPolicy, Spec

    return Spec(
        classes=("a", "b", "c"),
        palette=((0, 0, 0), (90, 0, 0), (0, 90, 0)),
        input=InputPolicy(smallest=SIZE, usual=SIZE, largest=SIZE),
    )


def tiny_photo() -> Any:
    """uint8 [1, 32, 32, 3]"""
    import numpy as np

    return np.random.default_rng(0).integers(0, 256, (1, *SIZE, 3), dtype=np.uint8)


def tiny_model() -> Any:
    """A graph of two convolutions, as our exports are: photos in, labels out."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    from srdeploy.spec import ONNX_KEY

    rng = np.random.default_rng(0)
    kernels = [
        numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name)
        for name, shape in (("stem.weight", (8, 3, 3, 3)), ("head.weight", (3, 8, 1, 1)))
    ]
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], name="Cast", to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["floats"], ["planes"], name="Transpose", perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "stem.weight"], ["x"], name="stem/Conv", pads=[1] * 4),
        helper.make_node("Relu", ["x"], ["features"], name="stem/Relu"),
        helper.make_node("Conv", ["features", "head.weight"], ["scores"], name="head/Conv"),
        helper.make_node("ArgMax", ["scores"], ["best"], name="ArgMax", axis=1, keepdims=0),
        helper.make_node("Cast", ["best"], ["labels"], name="labels", to=TensorProto.UINT8),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", "H", "W", 3])
    labels = helper.make_tensor_value_info("labels", TensorProto.UINT8, ["N", "H", "W"])
    graph = helper.make_graph(nodes, "doctor", [images], [labels], kernels)
    opset = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=9)
    helper.set_model_props(model, {ONNX_KEY: tiny_spec().to_json()})
    return model


@contextmanager
def tiny_file() -> Iterator[Path]:
    """The graph as a file, for as long as it is needed."""
    import onnx

    with TemporaryDirectory(prefix="srdeploy-") as name:
        path = Path(name) / "model.onnx"
        onnx.save(tiny_model(), str(path))
        yield path


# What `srdeploy doctor` tries, each in a process of its own: a library that crashes, prints or
# hangs must not take the report with it.

if TYPE_CHECKING:
    from srdeploy.precision import HalfPrecision

Answers = dict[str, Any]


def torch_probe() -> Answers:
    """A training step on each device, torch's runtime and an export, of a tiny network."""
    return {
        "train cpu": attempt(partial(_train, "cpu")),
        "train cuda": attempt(partial(_train, "cuda")),
        "run cpu": attempt(partial(_run_torch, "cpu")),
        "run cuda": attempt(partial(_run_torch, "cuda")),
        "export": attempt(_export),
    }


def conversion_probe() -> Answers:
    """The conversions of an exported graph to other types."""
    return {
        "fp16": attempt(partial(_to_half, "fp16")),
        "bf16": attempt(partial(_to_half, "bf16")),
        "int8": attempt(_to_int8),
    }


def graph_probe_name(backend: Backend, device: DeviceKind) -> str:
    """The probe that runs a graph in `backend`: one process for each backend and device."""
    return backend.name if device == backend.devices[0] else f"{backend.name}-{device}"


def graph_probe(backend: Backend, device: DeviceKind) -> Answers:
    """A graph in `backend`, in each precision that there is to choose."""
    if not backend.precisions:
        return {"run": attempt(partial(_run_graph, device, backend.name))}
    return {
        name: attempt(partial(_run_graph, device, backend.name, precision=name))
        for name in backend.precisions
    }


def providers_probe() -> Answers:
    """The providers that onnxruntime says it has."""
    with suppress(ImportError):
        import onnxruntime

        return {"offered": list(onnxruntime.get_available_providers())}
    return {"offered": []}


def tensorrt_probe() -> Answers:
    """TensorRT: its libraries, an engine for this GPU, and a run of it."""
    return _tensorrt("tensorrt")


def rtx_probe() -> Answers:
    """TensorRT for RTX: the same, ahead of time where there is no GPU."""
    return _tensorrt("rtx")


def gpu_probe() -> Answers:
    """The GPUs, by NVIDIA's management library, and what CUDA's driver offers."""
    answers: Answers = {"gpus": [], "driver": None, "cuda": None}
    answers["nvml"] = attempt(partial(_ask_nvml, answers))
    answers["cuda driver"] = attempt(partial(_ask_cuda, answers))
    return answers


def server_probe() -> Answers:
    """The packages of the server."""
    modules = (
        *("fastapi", "fastapi_offline", "python_multipart", "prometheus_client"),
        *("uvicorn", "uvloop", "httptools"),
    )
    return {"import": attempt(partial(_import, "serve", *modules))}


def ray_probe() -> Answers:
    """Ray's data sets."""
    return {"import": attempt(partial(_import, "ray", "ray.data"))}


def probes() -> dict[str, Callable[[], Answers]]:
    """Everything that can be tried, by name."""
    of_graphs: dict[str, Callable[[], Answers]] = {
        graph_probe_name(backend, device): partial(graph_probe, backend, device)
        for backend in BACKENDS
        if backend.runs_graphs
        for device in backend.devices
    }
    return of_graphs | {
        "torch": torch_probe,
        "conversion": conversion_probe,
        "providers": providers_probe,
        "tensorrt": tensorrt_probe,
        "rtx": rtx_probe,
        "gpu": gpu_probe,
        "server": server_probe,
        "ray": ray_probe,
    }


def attempt(action: Callable[[], None]) -> str | None:
    """None where `action` works, else the reason in one line."""
    try:
        action()
    except UserError as error:
        return " ".join(str(error).split())
    except Exception as error:  # whatever a library raises is what people want to know
        text = " ".join(str(error).split())[:300]
        return f"{type(error).__name__}: {text}" if text else type(error).__name__
    return None


def _train(device: str) -> None:
    import torch

    from srdeploy.models import make_network
    from srdeploy.train.device import find_device
    from srdeploy.train.regulation import SelfRegulation

    place = find_device(device)
    regulated = SelfRegulation(make_network("unet", 3, width=4), 3).to(place)
    images = torch.rand(2, 3, *SIZE, device=place)
    labels = torch.zeros(2, *SIZE, dtype=torch.uint8, device=place)
    regulated.losses(images, labels, progress=1.0).total.backward()


def _run_torch(device: str) -> None:
    from srdeploy.files import write_json, write_whole
    from srdeploy.models import make_network
    from srdeploy.models.weights import save_weights
    from srdeploy.runtimes.registry import open_runtime

    with TemporaryDirectory(prefix="srdeploy-") as name:
        run = Path(name)
        save_weights(make_network("unet", 3, width=4), run / "network.safetensors")
        write_whole(run / "config.yaml", "network:\n  name: unet\n  options: {width: 4}\n")
        write_json(run / "spec.json", tiny_spec().model_dump(mode="json"))
        with open_runtime(run, device) as runtime:
            runtime.run(tiny_photo())


def _export() -> None:
    from torch import nn

    from srdeploy.deployable import Deployable
    from srdeploy.export.to_onnx import export_onnx

    spec = tiny_spec()
    with TemporaryDirectory(prefix="srdeploy-") as name:
        network = nn.Conv2d(3, 3, 3, padding=1).eval()
        export_onnx(Deployable(network, spec), spec, Path(name) / "model.onnx")


def _to_half(precision: "HalfPrecision") -> None:
    from srdeploy.export.precision.half import to_half

    to_half(tiny_model(), precision)


def _to_int8() -> None:
    from srdeploy.export.precision.int8 import to_int8

    to_int8(tiny_model(), [tiny_photo()[0]], "cpu", ends=True)


def _run_graph(device: str, runtime: str, **options: Any) -> None:
    from srdeploy.runtimes.registry import open_runtime

    with tiny_file() as graph, open_runtime(graph, device, runtime, **options) as opened:
        opened.run(tiny_photo())


def _tensorrt(builder: Literal["tensorrt", "rtx"]) -> Answers:
    from srdeploy.runtimes.gpus import find_gpu
    from srdeploy.runtimes.registry import open_runtime
    from srdeploy.runtimes.trt.engine import import_tensorrt

    def build(engine: Path, graph: Path, capability: str | None) -> None:
        from srdeploy.artifacts.artifact import Profile
        from srdeploy.export.engines.build import BuildOptions, build_engine

        shape = (1, *SIZE)
        profile = Profile(smallest=shape, usual=shape, largest=shape)
        sm = () if capability is None else (capability,)
        options = BuildOptions(
            builder=builder, precision="fp32", sm=sm, profiles=(profile,), command="srdeploy doctor"
        )
        build_engine(graph, engine, options)

    def build_and_run() -> None:
        import_tensorrt(builder)
        gpu = find_gpu(0)
        with tiny_file() as graph:
            engine = graph.with_suffix(".engine")
            build(engine, graph, gpu.compute_capability if builder == "rtx" else None)
            with open_runtime(engine, "cuda") as runtime:
                runtime.run(tiny_photo())

    def build_ahead() -> None:
        with tiny_file() as graph:
            build(graph.with_suffix(".engine"), graph, "8.9" if builder == "rtx" else None)

    return {
        "import": attempt(partial(_checked_import, builder)),
        "build": attempt(build_ahead),
        "run": attempt(build_and_run),
    }


def _checked_import(builder: Literal["tensorrt", "rtx"]) -> None:
    from srdeploy.runtimes.trt.engine import import_tensorrt

    # The libraries load with the package; a version that can't be told is no working one.
    str(import_tensorrt(builder).__version__)


def _ask_nvml(answers: Answers) -> None:
    try:
        import pynvml
    except ImportError as error:
        raise MissingPackageError("nvidia-ml-py", "tensorrt", "asking for GPUs") from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise UserError(f"no NVIDIA driver: {error}") from error
    answers["driver"] = pynvml.nvmlSystemGetDriverVersion()
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        answers["gpus"].append(
            {
                "name": pynvml.nvmlDeviceGetName(handle),
                "memory_bytes": int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
                "compute_capability": f"{major}.{minor}",
            }
        )


def _ask_cuda(answers: Answers) -> None:
    from srdeploy.runtimes.gpus import cuda_driver_version

    answers["cuda"] = cuda_driver_version()


def _import(extra: str, *modules: str) -> None:
    from importlib import import_module

    for module in modules:
        try:
            import_module(module)
        except ModuleNotFoundError as error:
            raise MissingPackageError(module, extra, "this") from error


def main() -> None:
    """PROBE FILE: writes the probe's answers to FILE, whatever libraries print."""
    name, file = sys.argv[1:]
    Path(file).write_text(json.dumps(probes()[name]()))
