"""The house stands: links, packages, module names, and what importing costs."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("train", "export", "serve")
DEPENDENCIES = {
    "cuda",
    "fastapi",
    "jinja2",
    "matplotlib",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "PIL",
    "pycuda",
    "pydantic",
    "ray",
    "rich",
    "safetensors",
    "scipy",
    "tensorrt",
    "torch",
    "typer",
    "yaml",
}


def modules() -> list[Path]:
    folders = [ROOT / "srdeploy", *(ROOT / stage for stage in STAGES)]
    return [
        path
        for folder in folders
        for path in folder.rglob("*.py")
        if "__pycache__" not in path.parts
    ]


def imported_by(statement: str) -> set[str]:
    """Names in sys.modules after `statement` ran in a fresh interpreter."""
    code = f"{statement}\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return set(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize("stage", STAGES)
def test_the_link_to_a_stage_is_relative_and_right(stage: str) -> None:
    link = ROOT / "srdeploy" / stage
    assert link.is_symlink()
    assert os.readlink(link) == f"../{stage}"
    assert (link / "__init__.py").is_file()


def test_the_wheel_lists_every_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "srdeploy").rglob("__init__.py")
        if not any((ROOT / "srdeploy" / s) in path.parents for s in STAGES)
    }
    found |= {
        "srdeploy." + ".".join(path.parent.relative_to(ROOT).parts)
        for stage in STAGES
        for path in (ROOT / stage).rglob("__init__.py")
    }
    assert set(listed) == found


def test_no_module_is_named_like_a_dependency_or_the_standard_library() -> None:
    taken = DEPENDENCIES | set(sys.stdlib_module_names)
    assert [str(path) for path in modules() if path.stem in taken] == []


def test_the_version_is_the_one_in_the_changelog() -> None:
    from srdeploy import __version__

    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_pin_of_the_set_up_is_exact_and_torch_is_the_pinned_one() -> None:
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert [line for line in lines if "==" not in line] == []
    assert "torch==2.13.0" in lines


@pytest.mark.wheel
def test_importing_srdeploy_loads_nothing_heavy() -> None:
    loaded = imported_by("import srdeploy")
    assert (
        loaded & {"torch", "numpy", "onnx", "onnxruntime", "pydantic", "typer", "scipy", "PIL"}
        == set()
    )


@pytest.mark.wheel
def test_the_command_line_starts_without_heavy_imports_and_without_bare_stage_names() -> None:
    loaded = imported_by(
        "import sys; sys.argv = ['srdeploy', '--help']\n"
        "from srdeploy.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass"
    )
    assert (
        loaded & {"torch", "numpy", "onnx", "onnxruntime", "pydantic", "scipy", "PIL", *STAGES}
        == set()
    )


@pytest.mark.wheel
def test_public_names_are_found_and_unknown_ones_are_refused() -> None:
    import srdeploy

    for name in srdeploy.__all__:
        assert getattr(srdeploy, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = srdeploy.nothing
