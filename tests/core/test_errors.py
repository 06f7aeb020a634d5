"""A missing package is one line with what pip must install, taken from the installed metadata."""

import importlib.metadata
import subprocess
import sys

import pytest

from srdeploy.errors import MissingPackageError, extra_packages, missing_package

REQUIREMENTS = [
    "numpy>=1.26",
    "onnxruntime>=1.24.1; extra == 'cpu'",
    'fastapi>=0.115; extra == "serve"',
    'uvicorn >=0.34 ; extra == "serve"',
    'ray[data]<2.64,>=2.60; extra == "ray"',
    'tensorrt-rtx>=1.2; platform_machine == "x86_64" and extra == "rtx"',
    "srdeploy[cpu,serve]; extra == 'all'",
    "torch>=2.8; extra == 'all'",
    "torch>=2.8; extra == 'train'",
    "safetensors>=0.4.5; extra == 'train'",
]


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: REQUIREMENTS)


@pytest.mark.usefixtures("metadata")
@pytest.mark.parametrize(
    ("extra", "line"),
    [
        ("cpu", "pip install onnxruntime"),
        ("serve", "pip install fastapi uvicorn"),
        ("ray", "pip install 'ray[data]<2.64'"),
        ("rtx", "pip install tensorrt-rtx"),
        ("train", "pip install torch safetensors"),
        ("unknown", "pip install package"),
    ],
)
def test_the_pip_line_names_the_extras_packages(extra: str, line: str) -> None:
    error = MissingPackageError("package", extra, "this job")
    assert str(error) == f"this job needs package, which is not installed: {line}"


@pytest.mark.usefixtures("metadata")
def test_a_missing_module_of_ours_leads_to_the_narrowest_extra() -> None:
    error = missing_package(ModuleNotFoundError(name="torch.nn"), "srdeploy train")
    assert str(error) == (
        "srdeploy train needs torch, which is not installed: pip install torch safetensors"
    )
    assert missing_package(ModuleNotFoundError(name="my_package"), "srdeploy train") is None


@pytest.mark.usefixtures("metadata")
def test_a_missing_requirement_of_every_installation_is_named_by_itself() -> None:
    error = missing_package(ModuleNotFoundError(name="numpy"), "srdeploy data")
    assert str(error).endswith("pip install numpy")


def test_without_metadata_the_package_itself_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    assert str(MissingPackageError("ray", "ray", "this")).endswith("pip install ray")


def test_the_extras_of_this_installation_are_read() -> None:
    assert extra_packages("cpu") == ("onnxruntime",)
    assert {"fastapi", "uvicorn"} <= set(extra_packages("serve"))
    assert extra_packages("openvino") == ("openvino",)


@pytest.mark.parametrize(
    "words",
    [
        ("train", "{data}", "--out", "{out}"),
        ("models", "unet"),
        ("inspect", "unet"),
        ("export", "unet", "--weights", "w.pth", "--classes", "{data}/classes.json"),
        ("demo", "--out", "{out}"),
        ("bench", "train"),
    ],
    ids=lambda words: words[0],
)
def test_without_torch_a_verb_that_needs_it_says_so_in_one_line(words: tuple[str, ...]) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        f"sys.argv[1:] = {[w.format(data='absent', out='absent') for w in words]!r}\n"
        "from srdeploy.cli.main import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = result.stderr.splitlines()[-1]
    assert result.returncode == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert f"error: srdeploy {words[0]} needs torch, which is not installed: pip install" in last
