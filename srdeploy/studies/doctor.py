"""What this machine has, and what each verb can do here. Nothing is concluded from a version or a
list: every ability is tried, in a process of its own."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from srdeploy.environment import describe_environment, versions
from srdeploy.runtimes.registry import BACKENDS, Backend, DeviceKind, runtime_packages
from srdeploy.studies.doctor_probes import graph_probe_name
from srdeploy.validation import Settings

if TYPE_CHECKING:
    from rich.table import Table

Offered = Mapping[str, frozenset[str]]
"""Verb -> its options, as the command line has them."""

PACKAGES = (
    *("torch", "torchvision", "numpy", "onnx", "onnxscript"),
    *(package for package in runtime_packages() if package != "torch"),
    *("pycuda", "tritonclient", "fastapi", "uvicorn", "ray", "transformers"),
)
SECONDS = 120
"""After which a probe is given up."""
RUNNERS = ("evaluate", "predict", "bench")


@dataclass(frozen=True)
class _Check:
    """What is told of one ability, and where its answer comes from."""

    verb: str
    options: str
    probe: str
    answers: tuple[str, ...]
    """Names of the probe's answers: the first that is no success is the reason."""
    note: str = ""
    essential: bool = False
    """Whether an environment without it is broken, rather than without an extra."""


def checks() -> list[_Check]:
    """Everything that is tried, in the order of the report."""
    return [
        _Check("train", "--device cpu", "torch", ("train cpu",), essential=True),
        _Check("train", "--device cuda", "torch", ("train cuda",)),
        _Check("export", "", "torch", ("export",), essential=True),
        *(
            _Check("export", f"--precision {name}", "conversion", (name,))
            for name in ("fp16", "bf16", "int8")
        ),
        _Check("export", "--trt", "tensorrt", ("import", "build")),
        _Check("export", "--trt --builder rtx", "rtx", ("import", "build")),
        *(
            check
            for backend in BACKENDS
            for device in backend.devices
            for check in _runs_of(backend, device)
        ),
        _Check("serve", "", "server", ("import",)),
        _Check("predict", "--engine ray", "ray", ("import",)),
    ]


def _runs_of(backend: Backend, device: DeviceKind) -> Iterator[_Check]:
    """The trials of one runtime on one device: what it opens decides what is run."""
    options = f"--runtime {backend.name}" + (" --device cuda" if device == "cuda" else "")
    if backend.runs_graphs:
        probe = graph_probe_name(backend, device)
        for name in backend.precisions or ("run",):
            chosen = "" if name in ("run", *backend.precisions[:1]) else f" --precision {name}"
            yield _Check("predict", options + chosen, probe, (name,))
    elif "engine" in backend.artifacts:
        yield _Check("predict", options, "tensorrt", ("run",))
        yield _Check("predict", options, "rtx", ("run",), note="built for RTX")
    else:
        yield _Check("predict", options, "torch", (f"run {device}",), essential=device == "cpu")


class GpuDescription(Settings):
    """One GPU as the driver describes it."""

    name: str
    memory_bytes: int
    compute_capability: str


class Ability(Settings):
    """Something that a verb does, and whether it works here."""

    verb: str
    """Runs of artifacts stand under predict; evaluate and bench do as it does."""
    options: str
    note: str
    ok: bool
    reason: str | None
    """What is missing, with the pip line where there is one; None where it works."""


class Diagnosis(Settings):
    """All that `srdeploy doctor` finds."""

    environment: dict[str, str]
    """srdeploy, Python, system, processor, cores."""
    gpus: tuple[GpuDescription, ...]
    driver: str | None
    """Version of NVIDIA's driver."""
    cuda: str | None
    """Newest CUDA version that the driver runs."""
    gpu_note: str | None
    """Why the GPUs can't be asked for."""
    packages: dict[str, str | None]
    """Version by package; None where it is absent. torch's tells its CUDA build."""
    providers: tuple[str, ...]
    """Those that onnxruntime says it has: whether they start, the abilities tell."""
    abilities: tuple[Ability, ...]
    problems: tuple[str, ...]
    """What is broken rather than absent; each makes the exit code 1."""

    def tables(self) -> "tuple[Table, Table]":
        """The machine, and what each verb can do on it."""
        from rich.table import Table

        machine = Table(title="this machine", show_header=False, title_justify="left")
        for name, value in self.environment.items():
            machine.add_row(name, value)
        for gpu in self.gpus:
            memory = f"{gpu.memory_bytes / 2**30:.0f} GiB"
            machine.add_row(
                "GPU", f"{gpu.name}, {memory}, compute capability {gpu.compute_capability}"
            )
        if not self.gpus:
            machine.add_row("GPU", f"none ({self.gpu_note})" if self.gpu_note else "none")
        machine.add_row("NVIDIA driver", self.driver or "none")
        if self.cuda is not None:
            machine.add_row("CUDA of the driver", self.cuda)
        for name, version in self.packages.items():
            machine.add_row(name, version or "-")
        machine.add_row("onnxruntime lists", ", ".join(self.providers) or "-")
        verbs = Table(title="what each verb can do here", title_justify="left")
        for header in ("", "verb", "with", "what is missing"):
            verbs.add_column(header)
        for one in self.abilities:
            verb = ", ".join(RUNNERS) if one.verb == "predict" and _is_run(one) else one.verb
            what = f"{one.options} ({one.note})" if one.note else one.options
            mark = "[green]✓[/green]" if one.ok else "[red]✗[/red]"
            verbs.add_row(mark, verb, what, _plain(one.reason or ""))
        return machine, verbs


def diagnose(offered: Offered) -> Diagnosis:
    """Tries everything that the command line offers. Takes seconds.

    offered: what there is to try; of what this version has no verb or option for, nothing is told.
    """
    tried = [check for check in checks() if _is_offered(check, offered)]
    names = sorted({check.probe for check in tried} | {"gpu", "providers"}, key=_longest_first)
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        answers = dict(zip(names, pool.map(run_probe, names), strict=True))
    abilities = [_ability(check, answers[check.probe]) for check in tried]
    found = versions(PACKAGES)
    problems = [
        f"{check.verb} {check.options}".strip() + f" does not work: {ability.reason}"
        for check, ability in zip(tried, abilities, strict=True)
        if check.essential and not ability.ok and "failure" not in answers[check.probe]
    ]
    problems += [
        f"trying {name} {one['failure']}" for name, one in answers.items() if "failure" in one
    ]
    if "onnxruntime" in found and "onnxruntime-gpu" in found:
        problems.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files: "
            "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install the one that you want"
        )
    gpu = answers["gpu"]
    return Diagnosis(
        environment=describe_environment(()),
        gpus=gpu.get("gpus", ()),
        driver=gpu.get("driver"),
        cuda=gpu.get("cuda"),
        gpu_note=gpu.get("nvml", gpu.get("failure")),
        packages={name: found.get(name) for name in PACKAGES},
        providers=answers["providers"].get("offered", ()),
        abilities=tuple(abilities),
        problems=tuple(problems),
    )


def run_probe(name: str) -> dict[str, Any]:
    """The answers of one probe; {"failure": reason} where its process did not live to answer."""
    code = "from srdeploy.studies.doctor_probes import main; main()"
    # The probe sees the modules that this process sees, and not those that happen to lie in the
    # working folder.
    paths = os.pathsep.join(path for path in sys.path if path)
    with TemporaryDirectory(prefix="srdeploy-") as folder:
        file = Path(folder) / "answers.json"
        command = [sys.executable, "-P", "-c", code, name, str(file)]
        try:
            done = subprocess.run(
                command,
                env={**os.environ, "PYTHONPATH": paths},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            return {"failure": f"gave no answer within {SECONDS} s"}
        if done.returncode == 0:
            answers = json.loads(file.read_text())
            assert isinstance(answers, dict)
            return answers
    return {"failure": _last_words(done)}


def _ability(check: _Check, answers: Mapping[str, Any]) -> Ability:
    reasons = (answers.get(name, answers.get("failure")) for name in check.answers)
    reason = next((one for one in reasons if one is not None), None)
    if reason is not None:
        reason = reason.removeprefix("device cuda was asked for, but ")
    return Ability(
        verb=check.verb, options=check.options, note=check.note, ok=reason is None, reason=reason
    )


def _is_offered(check: _Check, offered: Offered) -> bool:
    options = {word for word in check.options.split() if word.startswith("--")}
    return check.verb in offered and options <= offered[check.verb]


def _is_run(ability: Ability) -> bool:
    return ability.options.startswith("--runtime")


def _longest_first(name: str) -> tuple[bool, str]:
    """torch's probe takes as long as all others together."""
    return name != "torch", name


def _last_words(done: "subprocess.CompletedProcess[str]") -> str:
    """Why a probe's process ended without an answer."""
    if done.returncode < 0:
        return f"crashed ({signal.Signals(-done.returncode).name})"
    lines: Sequence[str] = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return (lines[-1] if lines else f"ended with exit code {done.returncode}")[:300]


def _plain(text: str) -> str:
    """`text` without rich's markup: pip's srdeploy[gpu] is no style."""
    from rich.markup import escape

    return escape(text)
