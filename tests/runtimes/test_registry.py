"""One table knows the backends: a new one is its own file and a row, and every part follows."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from srdeploy.artifacts.artifact import Artifact
from srdeploy.errors import MissingPackageError, UserError
from srdeploy.imaging import Pixels
from srdeploy.runtimes import registry
from srdeploy.runtimes.base import Logits, Runtime, RuntimeOptions
from srdeploy.runtimes.registry import BACKENDS, Backend, open_runtime
from srdeploy.spec import Spec
from tests.conftest import MakeGraph

ROOT = Path(__file__).resolve().parents[2]


class ToyRuntime(Runtime):
    """Calls every pixel class 1."""

    backend = "toy"

    def __init__(self, artifact: Artifact, spec: Spec, options: RuntimeOptions) -> None:
        super().__init__(artifact, spec, options.device, (None, None, None, 3))
        self.precision = {"t4": "toy4", "t8": "toy8"}[options.precision or "t4"]

    def _open(self) -> None:
        pass

    def _close(self) -> None:
        pass

    def _labels(self, images: Pixels) -> Pixels:
        return np.ones(images.shape[:3], np.uint8)

    def _logits(self, images: Pixels) -> Logits:
        raise UserError("the toy has no logits")


TOY = Backend(
    name="toy",
    label="Toy",
    loader="tests.runtimes.test_registry:ToyRuntime",
    library="toy_library",
    packages=("toy-package",),
    extra="toy",
    devices=("cpu",),
    artifacts=("deploy", "onnx"),
    platform="toy_onnx",
    precisions=("t4", "t8"),
    threads=False,
)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Backend:
    """The toy has a row; its module is this one."""
    monkeypatch.setattr(registry, "BACKENDS", (*BACKENDS, TOY))
    monkeypatch.setattr("srdeploy.studies.doctor.BACKENDS", (*BACKENDS, TOY))
    monkeypatch.setattr("srdeploy.studies.doctor_probes.BACKENDS", (*BACKENDS, TOY))
    monkeypatch.setitem(sys.modules, "tests.runtimes.test_registry", sys.modules[__name__])
    return TOY


def photo() -> Pixels:
    return np.zeros((1, 40, 48, 3), np.uint8)


def test_a_row_is_enough_to_open_a_runtime(toy: Backend, make_graph: MakeGraph) -> None:
    with open_runtime(make_graph(), runtime="toy", precision="t8") as runtime:
        assert (runtime.run(photo()) == 1).all()
        assert (runtime.backend, runtime.precision) == ("toy", "toy8")


def test_a_row_is_enough_for_messages(toy: Backend, make_graph: MakeGraph) -> None:
    path = make_graph()
    with pytest.raises(UserError, match="Toy computes in t4 or t8, not in 't6'"):
        open_runtime(path, runtime="toy", precision="t6")
    with pytest.raises(UserError, match="toy runs on the CPU here, not on cuda: .*--runtime onnx"):
        open_runtime(path, "cuda", "toy")
    with pytest.raises(UserError, match="threads of the CPU, and Toy uses none"):
        open_runtime(path, runtime="toy", threads=2)
    message = r"only OpenVINO and Toy have a choice \(--runtime openvino or toy\)"
    with pytest.raises(UserError, match=message):
        open_runtime(path, precision="t8")
    with pytest.raises(UserError, match="unknown runtime 'toys': did you mean 'toy'"):
        open_runtime(path, runtime="toys")
    with pytest.raises(MissingPackageError, match=r"toy_library.* pip install toy_library"):
        registry.import_package("toy")


def test_a_row_is_enough_for_help(toy: Backend) -> None:
    assert registry.runtime_help().startswith(
        "auto, torch, onnxruntime, onnxruntime-tensorrt, openvino, tensorrt or toy; auto goes by"
    )
    assert "Arithmetic of Toy: t4 (default) or t8" in registry.precision_help()


def test_a_row_is_enough_to_predict(
    toy: Backend, make_graph: MakeGraph, tiny_data: Path, tmp_path: Path, srdeploy: Any
) -> None:
    photos, out = tiny_data / "images" / "val", tmp_path / "masks"
    options = ("--runtime", "toy", "--out", out, "--json")
    code, _, err = srdeploy("predict", make_graph(), photos, *options)
    assert code == 0, err
    assert len(list(out.rglob("*.png"))) >= 3


def test_a_row_is_enough_to_bench(toy: Backend, make_graph: MakeGraph) -> None:
    from srdeploy.serve.bench.entries import Setting
    from srdeploy.studies.bench_entries import entries_for

    setting = Setting("toy", "t8", 1, None)
    assert setting.arithmetic == "t8"
    with entries_for([make_graph()], [setting]) as (entry,):
        assert entry.forms == {}  # the artifact itself: t8 is the toy's arithmetic, no conversion


def test_a_row_is_enough_for_the_server(toy: Backend, make_graph: MakeGraph) -> None:
    from types import SimpleNamespace
    from typing import cast

    from srdeploy.serve.server.kserve import model_metadata

    with open_runtime(make_graph(), runtime="toy") as runtime:
        card = SimpleNamespace(
            **{"name": "night", "version": "1", "backend": runtime.backend, "spec": runtime.spec},
            **{"input_shape": runtime.input_shape, "precision": "toy4", "device": "cpu"},
        )
        assert model_metadata(cast(Any, card))["platform"] == "toy_onnx"


def test_a_row_is_enough_for_the_doctor(toy: Backend) -> None:
    from srdeploy.studies.doctor import checks
    from srdeploy.studies.doctor_probes import probes

    told = [(one.options, one.probe, one.answers) for one in checks() if "toy" in one.options]
    assert told == [
        ("--runtime toy", "toy", ("t4",)),
        ("--runtime toy --precision t8", "toy", ("t8",)),
    ]
    assert probes()["toy"]() == {"t4": None, "t8": None}
    assert "toy-package" in registry.runtime_packages()


def test_every_row_names_a_runtime_and_packages_of_its_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    offered = extras["optional-dependencies"]
    required = " ".join([*extras["dependencies"], *(one for v in offered.values() for one in v)])
    for backend in BACKENDS:
        loaded = backend.load()
        assert issubclass(loaded, Runtime)
        assert loaded.backend == backend.name
        assert backend.extra in offered
        for package in backend.packages:
            assert package in required


def test_the_table_is_light() -> None:
    code = (
        "import sys, srdeploy.runtimes.registry\n"
        "heavy = {'numpy', 'torch', 'pydantic', 'onnx', 'PIL', 'onnxruntime', 'openvino'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_only_its_own_file_and_the_table_name_a_backend() -> None:
    """The rule is tried on the backend with the most special cases."""
    own = {"openvino_runtime.py", "registry.py"}
    strays = [
        str(path.relative_to(ROOT))
        for stage in ("srdeploy", "train", "export", "serve")
        for path in sorted((ROOT / stage).rglob("*.py"))
        if "openvino" in ast.dump(ast.parse(path.read_text())).lower() and path.name not in own
    ]
    assert strays == []


def test_only_the_torch_backend_imports_torch() -> None:
    importers = set()
    for path in (ROOT / "srdeploy" / "runtimes").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "torch" for name in names):
                importers.add(path.name)
    assert importers == {"torch_runtime.py"}
