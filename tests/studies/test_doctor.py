"""The doctor: what is told was tried, and neither a missing nor a crashing library takes the
report with it."""

import json
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from srdeploy import __version__
from srdeploy.errors import extra_packages
from srdeploy.studies import doctor
from srdeploy.studies.doctor import Diagnosis, diagnose, run_probe

Block = Callable[..., None]
RUN = {"--runtime", "--device", "--precision"}


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """What the verb prints here, from a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "srdeploy", "doctor", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


@pytest.fixture
def block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Block:
    """Runs code at the start of every process that the doctor starts."""

    def at_start(code: str) -> None:
        (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(code))
        monkeypatch.syspath_prepend(str(tmp_path))

    return at_start


def absent(
    module: str, instead: str = "raise ModuleNotFoundError('No module named ' + name)"
) -> str:
    """Code after which `module` can't be imported."""
    return f"""
        import os, sys, time
        class Finder:
            def find_spec(self, name, path=None, target=None):
                if name == {module!r}:
                    {instead}
        sys.meta_path.insert(0, Finder())
    """


def canned(monkeypatch: pytest.MonkeyPatch, answers: Mapping[str, dict[str, Any]]) -> list[str]:
    """Replaces the probes; returns the list of those that were asked."""
    asked: list[str] = []

    def answer(name: str) -> dict[str, Any]:
        asked.append(name)
        return answers.get(name, {})

    monkeypatch.setattr(doctor, "run_probe", answer)
    return asked


def abilities(report: dict[str, Any]) -> dict[str, str | None]:
    """ "verb options" -> reason why not."""
    return {
        f"{one['verb']} {one['options']} {one['note']}".strip(): one["reason"]
        for one in report["abilities"]
    }


def test_the_json_is_the_diagnosis(report: dict[str, Any]) -> None:
    found = Diagnosis.model_validate(report)
    assert found.environment["srdeploy"] == __version__
    assert found.problems == ()
    assert all(one.ok == (one.reason is None) for one in found.abilities)
    assert found.packages["torch"] is not None


def test_what_works_here_is_told_as_working(report: dict[str, Any]) -> None:
    """The environment of the tests trains, exports and runs on the CPU."""
    told = abilities(report)
    for ability in ("train --device cpu", "export", "predict --runtime torch"):
        assert told[ability] is None
    for name in ("fp16", "bf16", "int8"):
        assert told[f"export --precision {name}"] is None
    for runtime, package in (("onnxruntime", "onnxruntime"), ("openvino", "openvino")):
        assert (told[f"predict --runtime {runtime}"] is None) == (find_spec(package) is not None)
    rtx = told["export --trt --builder rtx"]
    assert (rtx is None) == (find_spec("tensorrt_rtx") is not None)


def test_what_needs_a_gpu_fails_without_one_and_says_why(report: dict[str, Any]) -> None:
    if report["driver"] is not None:
        pytest.skip("this machine has an NVIDIA driver")
    assert report["gpus"] == []
    for ability, reason in abilities(report).items():
        if "cuda" in ability or ability == "export --trt":
            assert reason, ability
    assert "no NVIDIA driver" in report["gpu_note"]
    assert "CUDA devices: check the driver" in str(abilities(report)["train --device cuda"])


def test_only_what_the_command_line_offers_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = canned(monkeypatch, {"torch": {"train cpu": None, "train cuda": "no GPU"}})
    found = diagnose({"train": frozenset({"--device"})})
    assert [(one.verb, one.options, one.reason) for one in found.abilities] == [
        ("train", "--device cpu", None),
        ("train", "--device cuda", "no GPU"),
    ]
    assert set(asked) == {"torch", "gpu", "providers"}
    assert diagnose({"predict": frozenset(RUN)}).abilities[-1].note == "built for RTX"
    with_ray = diagnose({"predict": frozenset(RUN | {"--engine"}), "serve": frozenset()})
    assert {one.verb for one in with_ray.abilities} == {"predict", "serve"}
    assert with_ray.abilities[-1].options == "--engine ray"


def test_every_verb_that_is_told_of_exists(report: dict[str, Any]) -> None:
    from typer.main import get_command

    from srdeploy.cli.main import app

    commands: dict[str, Any] = getattr(get_command(app), "commands")  # noqa: B009
    for one in report["abilities"]:
        options = {
            option for parameter in commands[one["verb"]].params for option in parameter.opts
        }
        assert {word for word in one["options"].split() if word.startswith("--")} <= options


@pytest.mark.parametrize(
    ("probe", "answer", "module", "extra"),
    [
        ("onnxruntime", "run", "onnxruntime", "cpu"),
        ("openvino", "fp32", "openvino", "openvino"),
        ("rtx", "import", "tensorrt_rtx", "rtx"),
        ("tensorrt", "import", "tensorrt", "tensorrt"),
        ("gpu", "nvml", "pynvml", "tensorrt"),
        ("server", "import", "fastapi", "serve"),
        ("ray", "import", "ray", "ray"),
    ],
)
def test_a_missing_package_is_told_with_its_pip_line(
    block: Block, probe: str, answer: str, module: str, extra: str
) -> None:
    block(absent(module))
    reason = run_probe(probe)[answer]
    assert reason.endswith(shlex.join(["pip", "install", *extra_packages(extra)]))


def test_a_library_that_crashes_is_told_and_makes_the_environment_broken(
    block: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    block(absent("openvino", "os.abort()"))
    answers = run_probe("openvino")
    assert answers == {"failure": "crashed (SIGABRT)"}
    canned(monkeypatch, {"openvino": answers})
    found = diagnose({"predict": frozenset({"--runtime"})})
    crashed = next(one for one in found.abilities if one.options == "--runtime openvino")
    assert (crashed.ok, crashed.reason) == (False, "crashed (SIGABRT)")
    assert "trying openvino crashed (SIGABRT)" in found.problems


def test_a_library_that_prints_does_not_spoil_the_answer(block: Block) -> None:
    block("import sys; print('hello'); print('warning', file=sys.stderr)")
    assert set(run_probe("gpu")) == {"gpus", "driver", "cuda", "nvml", "cuda driver"}


def test_a_library_that_hangs_is_given_up(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    block("import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "SECONDS", 0.3)
    assert run_probe("gpu") == {"failure": "gave no answer within 0.3 s"}


def test_a_process_that_can_not_start_gives_its_last_words(block: Block) -> None:
    block(absent("srdeploy.studies.doctor_probes"))
    failure = run_probe("gpu")["failure"]
    assert failure == "ModuleNotFoundError: No module named srdeploy.studies.doctor_probes"


def test_modules_in_the_working_folder_are_not_taken_for_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('the folder was imported')")
    monkeypatch.chdir(tmp_path)
    assert "failure" not in run_probe("gpu")


def test_both_packages_of_onnxruntime_make_the_exit_code_1(
    srdeploy: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("onnxruntime", "onnxruntime-gpu"):
        folder = tmp_path / f"{name.replace('-', '_')}-1.31.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.31.0\n")
    canned(monkeypatch, {})
    assert srdeploy("doctor", "--json")[0] == 0
    monkeypatch.syspath_prepend(str(tmp_path))
    code, out, err = srdeploy("doctor", "--json")
    assert code == 1
    assert "overwrite each other's files: pip uninstall -y onnxruntime onnxruntime-gpu" in err
    assert json.loads(out)["packages"]["onnxruntime-gpu"] == "1.31.0"


def test_what_needs_no_extra_and_fails_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    canned(monkeypatch, {"torch": {"train cpu": "ImportError: libgomp.so.1"}})
    found = diagnose({"train": frozenset({"--device"})})
    assert found.problems == ("train --device cpu does not work: ImportError: libgomp.so.1",)


def test_people_get_tables_with_marks_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    gpu = {"name": "NVIDIA L4", "memory_bytes": 24 << 30, "compute_capability": "8.9"}
    answers: dict[str, dict[str, Any]] = {
        "gpu": {"gpus": [gpu], "driver": "580.65.06", "cuda": "13.0", "nvml": None},
        "onnxruntime": {"run": None},
        "providers": {"offered": ["CPUExecutionProvider"]},
        "onnxruntime-cuda": {
            "run": "device cuda was asked for, but no: pip install onnxruntime-gpu"
        },
    }
    canned(monkeypatch, answers)
    written = StringIO()
    console = Console(file=written, width=160)
    for table in diagnose({"predict": frozenset({"--runtime", "--device"})}).tables():
        console.print(table)
    lines = written.getvalue().splitlines()
    assert any("NVIDIA L4, 24 GiB, compute capability 8.9" in line for line in lines)
    assert any("580.65.06" in line for line in lines)
    works = next(line for line in lines if "--runtime onnxruntime " in line)
    assert "✓" in works
    assert "evaluate, predict, bench" in works
    fails = next(line for line in lines if "--runtime onnxruntime --device cuda" in line)
    assert "✗" in fails
    assert "no: pip install onnxruntime-gpu" in fails
    assert "asked for" not in fails
