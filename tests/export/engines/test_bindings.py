"""The names and signatures of TensorRT 10, 11 and for RTX that our code relies on exist there.

TensorRT proper needs a GPU, but its bindings' wheels are small and import without one, once the
libraries that they name exist: empty ones, which the compiler makes here.
"""

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.export.engines.uses import NAMES, read_uses

ROOT = Path(__file__).resolve().parents[3]
FILES = [
    *sorted((ROOT / "export" / "engines").glob("*.py")),
    *(ROOT / "srdeploy" / "runtimes" / "trt" / name for name in ("engine.py", "session.py")),
]
DESCRIBE = Path(__file__).with_name("describe_bindings.py")
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
"""What the bindings take from their libraries; nothing here calls them."""
EXPECTED = {
    "Builder.build_serialized_network",
    "BuilderFlag.TF32",
    "BuilderFlag.REFIT",
    "DataType.BF16",
    "EngineInspector.get_engine_information",
    "IBuilderConfig.profiling_verbosity",
    "ICudaEngine.device_memory_size_v2",
    "ICudaEngine.serialize_with_config",
    "IExecutionContext.execute_async_v3",
    "ILayer.get_input",
    "ILogger.WARNING",
    "INetworkDefinition.get_layer",
    "IOptimizationProfile.set_shape",
    "ITensor.dtype",
    "ITimingCache.serialize",
    "LayerType.CONVOLUTION",
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
    "OnnxParser.parse_from_file",
    "OnnxParserRefitter.refit_from_file",
    "ParserError.node_name",
    "Refitter.get_missing_weights",
    "Runtime.deserialize_cuda_engine",
    "SerializationFlag.EXCLUDE_WEIGHTS",
}
"""A few that must be among those found, or reading found nothing."""


def described(package: str, search: Path | None = None, libraries: Path | None = None) -> Any:
    """What a package offers, from a process of its own."""
    environment = dict(os.environ)
    if search is not None:
        environment["PYTHONPATH"] = str(search)
    if libraries is not None:
        environment["LD_LIBRARY_PATH"] = str(libraries)
    result = subprocess.run(
        [sys.executable, str(DESCRIBE), package],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@cache
def proper(major: int, folder: Path) -> Any:
    """What the bindings of TensorRT `major` offer, imported over empty libraries in `folder`."""
    wheel = ROOT / ".venv" / f"tensorrt{major}"
    if not wheel.is_dir():
        pytest.skip(f"no {wheel} (make setup): TensorRT {major}'s names were NOT checked")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip(f"no C compiler: TensorRT {major}'s names were NOT checked")
    source = folder / "empty.c"
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in FUNCTIONS))
    for library in LIBRARIES:
        name = f"lib{library}.so.{major}"
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", str(source), "-o"]
        subprocess.run([*command, str(folder / name)], check=True, timeout=60)
    return described("tensorrt_bindings", wheel, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("libraries")


@pytest.mark.parametrize("major", [10, 11])
def test_what_we_use_exists_in_tensorrt(major: int, folder: Path) -> None:
    offered = proper(major, folder)
    assert offered["version"].startswith(f"{major}.")
    report = read_uses(FILES, offered["names"], rtx=False)
    assert report.faults == []
    assert report.used >= EXPECTED


def test_what_we_use_exists_in_tensorrt_for_rtx(rtx: Any) -> None:
    offered = described("tensorrt_rtx")
    assert offered["version"] == rtx.__version__
    report = read_uses(FILES, offered["names"], rtx=True)
    assert report.faults == []
    assert report.used >= EXPECTED | {"IBuilderConfig.set_compute_capability"}


def test_the_parsers_of_graphs_and_of_weights_tell_errors_alike(rtx: Any) -> None:
    for name in ("num_errors", "get_error"):
        assert hasattr(rtx.OnnxParser, name)
        assert hasattr(rtx.OnnxParserRefitter, name)


FAULTY = """
def build(trt: Any, builder: Any, network: Any, parsed: Parsed, stranger: Any) -> None:
    config = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.FP17)
    config.max_workspace = 1
    profile = parsed.builder.create_optimization_profile()
    profile.set_shape("images", minimum=(1,), opt=(2,), max=(3,))
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    for layer in layers:
        layer.precision_is_set_to(1)
        layer.get_input(0, 1)
        layer.get_input(0).dtype.nbits
    trt.OnnxParser(network)
    trt.Gadget(1)
"""


def test_reading_finds_names_that_do_not_exist(rtx: Any, tmp_path: Path) -> None:
    file = tmp_path / "faulty.py"
    file.write_text(FAULTY)
    faults = read_uses([file], described("tensorrt_rtx")["names"], rtx=True).faults
    found = [fault.split(": ", 1)[1].split(" takes (")[0] for fault in faults]
    assert found == [
        "'stranger: Any' is not told in NAMES",
        "BuilderFlag.FP17 does not exist",
        "IBuilderConfig.max_workspace does not exist",
        "IOptimizationProfile.set_shape",
        "ILayer.precision_is_set_to does not exist",
        "ILayer.get_input",
        "DataType.nbits does not exist",
        "OnnxParser",
        "Gadget does not exist",
    ]


def test_every_name_that_is_told_is_in_use() -> None:
    text = "".join(file.read_text() for file in FILES)
    assert [name for name in NAMES if f"{name}: " not in text] == []
