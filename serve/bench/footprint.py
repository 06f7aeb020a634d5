"""Memory and time that loading an artifact and its first run take, in a fresh process.

The process is this module: a request comes on stdin, the answer is the last line of stdout, both
as JSON.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from srdeploy.artifacts.artifact import Builder, open_artifact, read_sidecar
from srdeploy.errors import UserError
from srdeploy.runtimes.base import parse_device
from srdeploy.runtimes.registry import choose_runtime, find_backend, open_runtime
from srdeploy.serve.bench.results import Footprint
from srdeploy.spec import Spec
from srdeploy.validation import Settings

MIB = 1024**2


class FootprintRequest(Settings):
    """What to measure, as measure_footprint takes it."""

    path: str
    batch: int
    size: tuple[int, int]
    device: str
    runtime: str
    """auto is resolved."""
    builder: Builder | None
    """Builder of the engine; None for other runtimes."""
    threads: int | None
    precision: str | None
    spec: Spec | None


def measure_footprint(
    path: Path,
    batch: int,
    size: tuple[int, int],
    *,
    device: str,
    runtime: str,
    threads: int | None,
    precision: str | None,
    spec: Spec | None,
) -> Footprint:
    """Loads the artifact in a process of its own and runs it once on noise [batch, H, W, 3].

    size: (H, W). device, runtime, threads, precision, spec: as open_runtime takes them. Raises
    UserError as open_runtime and run do, and where the process crashes.
    """
    artifact = open_artifact(path)
    name = choose_runtime(artifact, runtime)
    builder: Builder | None = None
    backend = find_backend(name)
    assert backend is not None
    if "engine" in backend.artifacts:  # no other backend's library is loaded in this process
        builder = read_sidecar(backend.load().pick_file(artifact, device).file).builder
    request = FootprintRequest(
        path=str(path),
        batch=batch,
        size=size,
        device=device,
        runtime=name,
        builder=builder,
        threads=threads,
        precision=precision,
        spec=spec,
    )
    # It sees the modules that this process sees, and not those that happen to lie in the working
    # folder.
    paths = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "srdeploy.serve.bench.footprint"],
        input=request.model_dump_json(),
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode != 0:
        raise UserError(
            f"{path}: the process that measures loading and memory {_failure(done)}: try the "
            "runtime with srdeploy doctor, or smaller images or batches where memory ran out"
        )
    answer = json.loads(done.stdout.splitlines()[-1])
    if "refused" in answer:
        raise UserError(answer["refused"])
    return Footprint.model_validate(answer)


def main() -> None:
    """The process: answers one request."""
    # Libraries print, from C too: from here on that goes to stderr, and only the answer to stdout.
    with os.fdopen(os.dup(1), "w") as stdout:
        os.dup2(2, 1)
        request = FootprintRequest.model_validate_json(sys.stdin.read())
        try:
            answer = _measure(request).model_dump_json()
        except UserError as error:
            answer = json.dumps({"refused": str(error)})
        # A line of its own, whatever was printed while Python started.
        stdout.write(f"\n{answer}\n")


def _measure(request: FootprintRequest) -> Footprint:
    start = time.perf_counter()
    _import_library(request.runtime, request.builder)
    import_s = time.perf_counter() - start
    _import_own(request.runtime)
    noise = np.random.default_rng(0)
    images = noise.integers(0, 256, (request.batch, *request.size, 3), dtype=np.uint8)
    before = _resident("VmRSS")
    start = time.perf_counter()
    with open_runtime(
        request.path,
        request.device,
        request.runtime,
        request.spec,
        request.threads,
        request.precision,
    ) as runtime:
        runtime.run(images)
        first_inference_s = time.perf_counter() - start
        peak = _resident("VmHWM")
        kind, index = parse_device(request.device)
        device_mib = None
        if kind == "cuda":
            from srdeploy.serve.bench.gpu_monitor import process_memory

            used = process_memory(index)
            device_mib = used / MIB if used is not None else None
    return Footprint(
        import_s=import_s,
        first_inference_s=first_inference_s,
        own_mib=(peak - before) / MIB,
        peak_mib=peak / MIB,
        device_mib=device_mib,
    )


def _import_library(runtime: str, builder: Builder | None) -> None:
    """Imports the runtime's third-party library."""
    backend = find_backend(runtime)
    assert backend is not None
    backend.load().import_library(builder)


def _import_own(runtime: str) -> None:
    """Imports what srdeploy needs to open any artifact: no cost of this one."""
    if runtime == "torch":
        import srdeploy.models  # noqa: F401
    else:
        import onnx  # noqa: F401  # metadata are read with it


def _resident(figure: str) -> int:
    """Bytes of this process in memory: VmRSS, now; VmHWM, at most so far. (getrusage may report
    the maximum of the process that started this one.)"""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == figure:
            return 1024 * int(value.split()[0])
    raise UserError(f"this system does not report a process's memory (/proc/self/status: {figure})")


def _failure(done: "subprocess.CompletedProcess[str]") -> str:
    if done.returncode < 0:
        return f"crashed ({signal.Signals(-done.returncode).name})"
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return f"failed ({(lines[-1] if lines else f'exit code {done.returncode}')[:300]})"


if __name__ == "__main__":
    main()
