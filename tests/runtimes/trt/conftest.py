"""A machine that is none, and engines for it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from srdeploy.artifacts.artifact import Builder, EngineSidecar, Profile, write_sidecar
from srdeploy.files import sha256_of
from srdeploy.graph.signature import read_signature
from srdeploy.precision import Precision
from srdeploy.runtimes.trt.cuda_api import Cuda
from tests.runtimes.trt.fake_cuda import FakeCuda
from tests.runtimes.trt.fake_machine import COMMAND, PROFILE, Bench, MakeEngine
from tests.runtimes.trt.fake_tensorrt import write_plan


@pytest.fixture
def api() -> Iterator[FakeCuda]:
    """CUDA with one GPU; everything must have been given back in the end."""
    fake = FakeCuda()
    yield fake
    assert fake.leaks() == []


@pytest.fixture
def cuda(api: FakeCuda) -> Cuda:
    return Cuda(api, 0)


@pytest.fixture
def make_engine(make_graph: Callable[..., Path]) -> MakeEngine:
    """Writes the colour graph, and beside it an engine of it with a sidecar."""

    def make(
        input: str = "uint8",
        output: str = "labels",
        profiles: tuple[Profile, ...] = (PROFILE,),
        builder: Builder = "tensorrt",
        precision: Precision = "fp32",
        layer_types: dict[str, int] | None = None,
        plan: bytes | None = None,
    ) -> Path:
        onnx = make_graph(f"{input}-{output}.onnx", input=input, output=output)
        signature = read_signature(onnx)
        assert signature.spec is not None
        if plan is None:
            kinds = {"labels": "UINT8", "logits": "FLOAT"}
            names = kinds if output == "both" else {output: kinds[output]}
            kind = "UINT8" if input == "uint8" else "FLOAT"
            ranges = [input_shapes(one, input == "float32") for one in profiles]
            plan = write_plan(ranges, (signature.input_name, kind), names)
        path = onnx.with_suffix(".engine")
        path.write_bytes(plan)
        sidecar = EngineSidecar(
            builder=builder,
            builder_version="11.4.0.106",
            compute_capabilities=("8.9",),
            gpu="NVIDIA L4",
            cuda_driver="13.0",
            precision=precision,
            layer_types=layer_types or {"float32": 1},
            read_from="engine",
            profiles=profiles,
            engine_sha256=sha256_of(path),
            engine_bytes=len(plan),
            onnx=onnx.name,
            onnx_sha256=sha256_of(onnx),
            command=COMMAND,
            spec=signature.spec,
            signature=signature,
        )
        write_sidecar(path, sidecar)
        return path

    return make


@pytest.fixture
def bench() -> Iterator[Bench]:
    """A machine; everything must have been given back in the end."""
    made = Bench()
    yield made
    assert made.api.leaks() == []
    assert made.api.current == 0


def input_shapes(profile: Profile, planes: bool) -> list[list[int]]:
    """As an engine tells them."""
    shapes = (profile.smallest, profile.usual, profile.largest)
    return [[n, 3, h, w] if planes else [n, h, w, 3] for n, h, w in shapes]
