"""A real engine on a real GPU, with all that goes around the host."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from srdeploy.artifacts.artifact import Builder, open_artifact
from srdeploy.errors import UserError
from srdeploy.export.engines.build import RTX_CAPABILITIES, BuildOptions, build_engine
from srdeploy.runtimes.base import RuntimeOptions
from srdeploy.runtimes.gpus import find_gpu
from srdeploy.runtimes.registry import open_runtime
from srdeploy.runtimes.trt.arrays import DeviceArray, Stream
from srdeploy.runtimes.trt.cuda_api import Cuda, import_cuda_runtime
from srdeploy.runtimes.trt.runtime import TensorRTRuntime
from tests.runtimes.trt.fake_machine import COMMAND, PROFILE, photos


@pytest.mark.tensorrt
@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("builder", ["tensorrt", "rtx"])
def test_a_real_engine_on_a_real_gpu(
    make_graph: Callable[..., Path], builder: Builder, cuda_graph: bool
) -> None:
    """Built here, run from the host and on the device, timed, and compared with onnxruntime."""
    package = "tensorrt_rtx" if builder == "rtx" else "tensorrt"
    pytest.importorskip(package, reason=f"no {package} here: no real engine was run")
    real = pytest.importorskip("cuda.bindings.runtime", reason="no real engine was run")
    try:
        capability = find_gpu(0).compute_capability
    except UserError as error:
        pytest.skip(f"{error}: no real engine was run")
    if builder == "rtx" and capability not in RTX_CAPABILITIES:
        pytest.skip(f"compute capability {capability}: no engine of TensorRT for RTX was run")
    onnx = make_graph(output="both", work=2)
    engine = onnx.with_suffix(".engine")
    build_engine(onnx, engine, BuildOptions(builder=builder, profiles=(PROFILE,), command=COMMAND))
    artifact = open_artifact(engine)
    assert artifact.spec is not None
    shapes = [(1, 32, 32), (9, 64, 64), (2, 33, 47), (1, 32, 32), (1, 32, 32)]
    with (
        TensorRTRuntime(
            artifact, artifact.spec, RuntimeOptions("cuda"), cuda_graph=cuda_graph
        ) as runtime,
        open_runtime(onnx, threads=1) as reference,
    ):
        for shape in shapes:
            images = photos(*shape)
            assert (runtime.run(images) == reference.run(images)).all()
            assert np.allclose(runtime.logits(images), reference.logits(images), atol=1e-2)
        images = photos(2)
        labels, times = runtime.timed_run(images)
        assert (labels == reference.run(images)).all()
        assert min(times.values()) > 0
        cuda = Cuda(import_cuda_runtime(builder), 0)
        given = DeviceArray(cuda, Stream(1), images.shape, np.uint8, None)
        kind = real.cudaMemcpyKind.cudaMemcpyHostToDevice
        assert real.cudaMemcpy(given.address, images.ctypes.data, images.nbytes, kind)[0] == 0
        for stream in (None, 1, 2):
            result = runtime.run_device(given, stream=stream)
            assert (result.numpy() == reference.run(images)).all()
    assert result.shape == images.shape[:3]
    assert (result.numpy() == labels).all()
