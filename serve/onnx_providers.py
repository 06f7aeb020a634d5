"""onnxruntime's execution providers: what each needs to start, and whether it really computes.

onnxruntime lists the providers that it was built with, whether or not their libraries are there,
and goes on with the CPU where one does not start. So nothing here believes a list.
"""

import ctypes
import io
import os
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any, Literal

from srdeploy.errors import UserError

Provider = Literal["cpu", "cuda", "tensorrt"]

NAMES: dict[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_LIBRARIES = {
    "cuda": "libonnxruntime_providers_cuda.so",
    "tensorrt": "libonnxruntime_providers_tensorrt.so",
}
_CALLED = {"cpu": "the CPU", "cuda": "CUDA", "tensorrt": "TensorRT"}
_NEEDS = {
    "cuda": "the driver and the CUDA libraries",
    "tensorrt": "the driver, the CUDA libraries and TensorRT 10 (pip install 'tensorrt<11')",
}

_WEIGHTED = ("Conv", "ConvTranspose", "MatMul", "Gemm")
"""Layers that must lie on the provider that was asked for. Shape arithmetic may stay on the CPU,
where onnxruntime puts it on purpose."""


def require_offered(ort: Any, provider: Provider, device: str) -> None:
    """Raises UserError where the installed package was not built with `provider`."""
    offered = ort.get_available_providers()
    if NAMES[provider] not in offered:
        raise UserError(
            f"device {device} was asked for, but the installed onnxruntime offers only "
            f"{', '.join(offered)}: pip install 'srdeploy[gpu]' in an environment without the "
            "CPU package, or use --device cpu"
        )


def provider_list(provider: Provider, index: int) -> list[Any]:
    """What a session is given, in the order of preference; `index` is the GPU's.

    What TensorRT leaves, such as casts of the input, is CUDA's; layers with weights are not, see
    require_provider.
    """
    # TF32 would be a silent loss of precision.
    cuda = (NAMES["cuda"], {"device_id": str(index), "use_tf32": "0"})
    # No flag for fp16 or int8: without them the graph's own types bind the builder. Engines kept
    # from other sessions could be another graph's.
    tensorrt = (NAMES["tensorrt"], {"device_id": str(index), "trt_engine_cache_enable": "0"})
    wanted: dict[Provider, list[Any]] = {"cpu": [], "cuda": [cuda], "tensorrt": [tensorrt, cuda]}
    return [*wanted[provider], NAMES["cpu"]]


def load_libraries(ort: Any, provider: Provider) -> None:
    """Loads what pip installed of CUDA, cuDNN and TensorRT, where the system's loader does not
    look. What is absent shows when the provider starts, and start_failure names it."""
    ort.set_default_logger_severity(4)  # else its log says the same in many lines
    # Its notes are prints; stdout is for results.
    with redirect_stdout(io.StringIO()), suppress(RuntimeError):
        ort.preload_dlls()
    if provider == "tensorrt":
        with suppress(ImportError):
            import tensorrt  # noqa: F401


def start_failure(ort: Any, provider: Provider, device: str) -> UserError:
    """Why `provider` did not start, as far as its library tells."""
    message = f"device {device} was asked for, but onnxruntime could not start {_CALLED[provider]}"
    library = Path(ort.__file__).parent / "capi" / _LIBRARIES[provider]
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        message += f" ({error})"
    return UserError(f"{message}: check {_NEEDS[provider]}, or use another --runtime or --device")


def require_provider(session: Any, provider: Provider, device: str) -> None:
    """Raises UserError unless `provider` computes every layer with weights.

    session: opened on `device` with session.record_ep_graph_assignment_info.
    """
    called = _CALLED[provider]
    if not hasattr(session, "get_provider_graph_assignment_info"):
        raise UserError(
            "this onnxruntime does not tell which device computes what, so that a fall-back to "
            "the CPU would stay unseen: pip install -U 'onnxruntime-gpu>=1.24.1'"
        )
    placed = [
        (part.ep_name, node.op_type, node.name)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]
    stray = [one for one in placed if one[0] != NAMES[provider] and one[1] in _WEIGHTED]
    if stray:
        elsewhere, kind, name = stray[0]
        raise UserError(
            f"device {device} was asked for, but {called} does not take {len(stray)} layers of "
            f"this graph, such as {kind} '{name}' (left to {elsewhere}): use another --runtime"
        )
    if all(one[0] != NAMES[provider] for one in placed):
        raise UserError(
            f"device {device} was asked for, but {called} takes no node of this graph: use "
            "another --runtime"
        )


def float32_of_tensorrt() -> str:
    """onnxruntime's TensorRT provider offers no way to forbid TF32 but this variable."""
    forbidden = os.environ.get("NVIDIA_TF32_OVERRIDE") == "0"
    return "float32" if forbidden else "float32 (TF32 allowed)"
