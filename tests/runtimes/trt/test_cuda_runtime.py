"""CUDA from Python: the names of the real bindings, and codes that become lines."""

import ast
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from srdeploy.errors import UserError
from srdeploy.runtimes.trt.cuda_api import Cuda, import_cuda_runtime
from tests.runtimes.trt.fake_cuda import FakeCuda, cudaError_t

SOURCES = sorted(Path(__file__).parents[3].glob("srdeploy/runtimes/trt/*.py"))


def bindings() -> Any:
    return pytest.importorskip(
        "cuda.bindings.runtime", reason="no cuda-python here: its names were NOT compared"
    )


def used_names() -> set[tuple[str, int | None]]:
    """Everything that is asked of the bindings: dotted name, and the number of arguments where it
    is called."""
    found: set[tuple[str, int | None]] = set()
    for source in SOURCES:
        tree = ast.parse(source.read_text())
        calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                dotted = ast.unparse(node)
                name = re.fullmatch(r"(?:self\._?)?(?:api|kinds)\.(cuda[\w.]+)", dotted)
                if name is None:
                    continue
                call = calls.get(id(node))
                assert call is None or not call.keywords
                if dotted.startswith("kinds."):
                    found.add((f"cudaMemoryType.{name[1]}", None))
                else:
                    found.add((name[1], len(call.args) if call else None))
    return found


def test_every_name_and_number_of_arguments_is_that_of_the_real_bindings() -> None:
    real: Any = bindings()
    fake: Any = FakeCuda()
    used = used_names()
    assert len(used) > 30
    for dotted, arguments in used:
        there, imitated = real, fake
        for name in dotted.split("."):
            there, imitated = getattr(there, name), getattr(imitated, name)
        if arguments is None:
            if not callable(there):
                assert int(there) == int(imitated), dotted
            continue
        signature = str(there.__doc__).splitlines()[0]
        parameters = re.fullmatch(rf"{dotted}\((.*)\)", signature)
        assert parameters is not None, signature
        assert len([one for one in parameters[1].split(",") if one]) == arguments, signature


def test_the_codes_of_the_fake_are_those_of_the_real_bindings() -> None:
    real = bindings()
    for code in cudaError_t:
        assert getattr(real.cudaError_t, code.name).value == code.value


def test_the_real_bindings_take_what_they_are_given() -> None:
    """Every call reaches the driver, which is absent, and no complaint about its arguments."""
    real = bindings()
    if real.cudaGetDeviceCount()[0] == real.cudaError_t.cudaSuccess:
        pytest.skip("this machine has a GPU: arguments are checked by the real test instead")

    class Counting:
        """The real bindings, but for the first question."""

        def cudaGetDeviceCount(self) -> tuple[Any, ...]:
            return (real.cudaError_t.cudaSuccess, 1)

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    cuda = Cuda(Counting(), 0)
    event, graph = real.cudaEvent_t(0), real.cudaGraphExec_t(0)
    refused: list[Any] = [
        lambda: cuda.allocate(64),
        lambda: cuda.allocate_pinned(64),
        lambda: cuda.memory_device(4096),
        lambda: cuda.copy_to_device(4096, 8192, 64, 16),
        lambda: cuda.copy_to_host(4096, 8192, 64, 16),
        lambda: cuda.fetch(4096, 8192, 64),
        lambda: cuda.new_stream(),
        lambda: cuda.synchronize(16),
        lambda: cuda.order(1, 16),
        lambda: cuda.record(16),
        lambda: cuda.milliseconds(event, event),
        lambda: cuda.capture(16, lambda: None),
        lambda: cuda.launch(graph, 16),
        lambda: cuda.on_device().__enter__(),
        lambda: cuda._checked(real.cudaSetDevice(0), "choosing"),
        lambda: cuda._checked(real.cudaEventRecord(event, 16), "recording"),
        lambda: cuda._checked(real.cudaStreamWaitEvent(16, event, 0), "waiting"),
        lambda: cuda._checked(real.cudaStreamEndCapture(16), "capturing"),
        lambda: cuda._checked(real.cudaGraphInstantiate(real.cudaGraph_t(0), 0), "capturing"),
    ]
    for call in refused:
        with pytest.raises(UserError, match="NVIDIA driver is absent or too old"):
            call()
    cuda.free(4096)
    cuda.free_pinned(4096)
    cuda.free_stream(16)
    cuda.free_event(event)
    cuda.free_graph(graph)
    cuda.drain(16)
    real.cudaGraphDestroy(real.cudaGraph_t(0))


def test_the_real_bindings_without_a_driver_give_one_line() -> None:
    real = bindings()
    if real.cudaGetDeviceCount()[0] == real.cudaError_t.cudaSuccess:
        pytest.skip("this machine has a driver: its absence was NOT tested")
    with pytest.raises(UserError, match=r"^device cuda:0 .*driver is absent or too old.*update it"):
        Cuda(import_cuda_runtime("tensorrt"), 0)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("cudaErrorInsufficientDriver", "cuda:1 .*absent or too old.*: install or update it"),
        ("cudaErrorNoDevice", "cuda:1 .*CUDA sees no GPU: see nvidia-smi and CUDA_VISIBLE_DEVICES"),
        ("cudaErrorInvalidValue", r"asking for the GPUs \(cudaErrorInvalidValue: the text of 1\)"),
        ("cudaErrorIllegalAddress", "the text of 700.*: start the process again"),
    ],
)
def test_codes_become_one_line_that_says_what_to_do(code: str, message: str) -> None:
    api = FakeCuda(count=2)
    api.fails["cudaGetDeviceCount"] = cudaError_t[code]
    with pytest.raises(UserError, match=message) as caught:
        Cuda(api, 1)
    assert "\n" not in str(caught.value)
    assert api.cleared == 1


def test_a_gpu_that_is_not_there_and_a_driver_library_that_is_not_there_are_told() -> None:
    with pytest.raises(UserError, match="cuda:2 was asked for, but CUDA sees 2 GPUs"):
        Cuda(FakeCuda(count=2), 2)

    def absent() -> None:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    with pytest.raises(UserError, match="there is no NVIDIA driver on this machine: install it"):
        Cuda(SimpleNamespace(cudaGetDeviceCount=absent), 0)


def test_the_callers_own_gpu_is_his_again_afterwards() -> None:
    api = FakeCuda(count=2)
    cuda = Cuda(api, 1)
    seen = []

    def fail() -> None:
        seen.append(api.current)
        raise KeyError

    with pytest.raises(KeyError), cuda.on_device():
        fail()
    assert seen == [1]
    assert api.current == 0
    api.current = 1
    api.calls.clear()
    with cuda.on_device():
        pass
    assert "cudaSetDevice" not in api.calls  # another library's context may be current
