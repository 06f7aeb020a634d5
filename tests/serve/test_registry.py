"""The table of runtimes: what a new backend has to touch."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from srdeploy.artifacts.artifact import Artifact
from srdeploy.imaging import Pixels
from srdeploy.runtimes.base import Logits, Runtime
from srdeploy.runtimes.registry import BACKENDS, Backend, choosing_precision, open_runtime
from srdeploy.serve.bench.entries import Setting
from srdeploy.spec import Spec
from srdeploy.studies.doctor_probes import graph_probe

MakeGraph = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("srdeploy", "train", "export", "serve")


class ToyRuntime(Runtime):
    """Everything is class 0."""

    backend = "toy"
    precision = "float32"

    def __init__(
        self, artifact: Artifact, spec: Spec, device: str, precision: str = "whole"
    ) -> None:
        super().__init__(artifact, spec, device, (None, None, None, 3))
        self.arithmetic = precision

    def _open(self) -> None:
        pass

    def _close(self) -> None:
        pass

    def _labels(self, images: Pixels) -> Pixels:
        return np.zeros(images.shape[:3], np.uint8)

    def _logits(self, images: Pixels) -> Logits:
        raise NotImplementedError


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that is one row and one module."""
    module: Any = ModuleType("toy_runtime")
    module.ToyRuntime = ToyRuntime
    module.import_library = lambda builder: None
    monkeypatch.setitem(sys.modules, "toy_runtime", module)
    row = Backend(
        loader="toy_runtime:ToyRuntime",
        runs={"onnx": "", "deploy": "", "run": "no {path}", "engine": "no {path}"},
        devices={"cpu": "", "cuda": "no {device}"},
        kserve_platform="toy_onnx",
        packages=("toy",),
        library="toy_runtime:import_library",
        precisions=("whole", "half"),
        takes_threads=False,
    )
    monkeypatch.setitem(BACKENDS, "toy", row)


@pytest.mark.usefixtures("toy")
def test_a_backend_is_one_row_and_one_module(make_graph: MakeGraph) -> None:
    with open_runtime(make_graph(), runtime="toy", precision="half") as runtime:
        assert isinstance(runtime, ToyRuntime)
        assert runtime.arithmetic == "half"
        assert runtime.run(np.zeros((2, 40, 48, 3), np.uint8)).shape == (2, 40, 48)


@pytest.mark.usefixtures("toy")
def test_the_benchmark_passes_the_arithmetic_to_backends_that_choose() -> None:
    assert "toy" in choosing_precision()
    assert Setting("toy", "half", 1, None).arithmetic == "half"
    assert Setting("onnxruntime", "fp16", 1, None).arithmetic is None


@pytest.mark.usefixtures("toy")
def test_doctor_tries_a_backend_in_each_of_its_arithmetics() -> None:
    assert graph_probe("toy", "cpu") == {"whole": None, "half": None}


@pytest.mark.parametrize("name", ["openvino", "pytorch_safetensors"])
def test_only_the_table_and_the_backend_name_it(name: str) -> None:
    allowed = {f"srdeploy/runtimes/{file}.py" for file in ("registry", "openvino_runtime")}
    naming = {
        str(path.relative_to(ROOT))
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        if name in path.read_text("utf-8").lower()
    }
    assert naming <= allowed


def test_every_row_runs_something_and_names_what_it_needs() -> None:
    for name, backend in BACKENDS.items():
        assert "" in backend.runs.values(), name
        assert backend.runs_on, name
        assert backend.packages, name
        assert set(backend.runs) == {"run", "deploy", "onnx", "engine"}
        assert set(backend.devices) == {"cpu", "cuda"}
