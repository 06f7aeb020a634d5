"""A machine with a GPU and TensorRT, both made of numpy, and engines for it."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from srdeploy.artifacts.artifact import Profile, open_artifact
from srdeploy.imaging import Pixels
from srdeploy.runtimes.base import RuntimeOptions
from srdeploy.runtimes.registry import open_runtime
from srdeploy.runtimes.trt.runtime import TensorRTLibraries, TensorRTRuntime
from tests.runtimes.trt.fake_cuda import FakeCuda
from tests.runtimes.trt.fake_tensorrt import FakeTensorRT

COMMAND = "srdeploy export runs/night --trt"
PROFILE = Profile(smallest=(1, 32, 32), usual=(1, 40, 48), largest=(4, 64, 64))

MakeEngine = Callable[..., Path]


class Bench:
    """A machine: CUDA, TensorRT, and runtimes on them."""

    def __init__(self) -> None:
        self.api = FakeCuda()
        self.trt = FakeTensorRT(self.api)

    def runtime(self, path: Path, cuda_graph: bool = False, device: str = "cuda") -> Any:
        artifact = open_artifact(path)
        assert artifact.spec is not None
        libraries = TensorRTLibraries(lambda _: self.trt, lambda _: self.api, lambda _, __: None)
        return TensorRTRuntime(
            artifact,
            artifact.spec,
            RuntimeOptions(device),
            cuda_graph=cuda_graph,
            libraries=libraries,
        )

    def give(self, images: np.ndarray, producer: int, **interface: Any) -> Any:
        """An array of another library, that the stream `producer` is still making."""
        address = self.api.cudaMalloc(images.nbytes)[1]
        self.api.write(address, images, producer)
        described = {
            "shape": images.shape,
            "typestr": images.dtype.str,
            "data": (address, False),
            "version": 3,
            "stream": producer,
        }
        return SimpleNamespace(__cuda_array_interface__=described | interface)

    def take_back(self, array: Any) -> None:
        self.api.cudaFree(array.__cuda_array_interface__["data"][0])

    def stream(self) -> int:
        return int(self.api.cudaStreamCreateWithFlags(1)[1])


def photos(count: int, height: int = 40, width: int = 48) -> Pixels:
    rng = np.random.default_rng([count, height, width])
    return rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def by_onnxruntime(engine: Path, images: Pixels) -> tuple[Pixels, np.ndarray | None]:
    """Labels, and logits where there are any, of the graph beside the engine."""
    with open_runtime(engine.with_suffix(".onnx"), threads=1) as reference:
        logits = None if engine.stem.endswith("labels") else reference.logits(images)
        return reference.run(images), logits


def launches(bench: Bench) -> int:
    return bench.api.calls.count("cudaGraphLaunch")
