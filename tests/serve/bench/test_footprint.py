"""Memory and start-up of an artifact, measured in a process of its own."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from srdeploy.errors import UserError
from srdeploy.serve.bench.footprint import measure_footprint
from srdeploy.serve.bench.results import Footprint
from srdeploy.spec import Spec

MakeGraph = Callable[..., Path]


def measured(
    path: Path,
    batch: int = 1,
    size: tuple[int, int] = (64, 64),
    device: str = "cpu",
    runtime: str = "auto",
    spec: Spec | None = None,
    precision: str | None = None,
) -> Footprint:
    return measure_footprint(
        path,
        batch,
        size,
        device=device,
        runtime=runtime,
        threads=1,
        precision=precision,
        spec=spec,
    )


@pytest.fixture
def at_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets what every new Python process does first."""

    def set_code(code: str) -> None:
        (tmp_path / "first").mkdir()
        (tmp_path / "first" / "sitecustomize.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path / "first")

    return set_code


def test_memory_grows_with_the_images_and_is_not_that_of_the_calling_process(
    make_graph: MakeGraph,
) -> None:
    ballast = np.ones(300 * 2**20, np.uint8)
    graph = make_graph(work=1)
    small = measured(graph)
    large = measured(graph, batch=4, size=(1024, 1024))
    for found in (small, large):
        assert found.import_s > 0
        assert found.first_inference_s > 0
        assert 0 < found.own_mib < found.peak_mib
        assert found.device_mib is None
    # One float32 tensor of the images, and the bytes that it was made from.
    assert large.own_mib - small.own_mib > 4 * 1024 * 1024 * 3 * (4 + 1) / 2**20
    assert small.peak_mib < ballast.nbytes / 2**20


def test_what_processes_print_is_no_answer(
    make_graph: MakeGraph, tiny_spec: Spec, at_start: Callable[[str], None]
) -> None:
    at_start(
        "import atexit, os\n"
        "print('{\"import_s\": 1}', end='', flush=True)\n"
        "atexit.register(os.write, 1, b'bye\\n')\n"
        "atexit.register(print, 'bye')\n"
    )
    foreign = make_graph("foreign.onnx", spec=None)
    assert measured(foreign, spec=tiny_spec).peak_mib > 0


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import os; os.kill(os.getpid(), 9)", r"colour\.onnx: the process .* crashed \(SIGKILL\)"),
        (
            "raise SystemExit('broken build')",
            r"failed \(SystemExit: broken build\): try the runtime with",
        ),
    ],
)
def test_a_crash_is_told_in_one_line(
    make_graph: MakeGraph, at_start: Callable[[str], None], code: str, expected: str
) -> None:
    at_start(code)
    with pytest.raises(UserError, match=expected) as refused:
        measured(make_graph())
    assert "\n" not in str(refused.value)


def test_a_refusal_inside_arrives_as_it_was_said(make_graph: MakeGraph) -> None:
    with pytest.raises(UserError, match=r"^.*fixed\.onnx takes only images of \[1, 64, 32, 3\]"):
        measured(make_graph("fixed.onnx", size=(1, 64, 32)))


def test_a_missing_library_is_told_with_the_line_that_installs_it(
    make_graph: MakeGraph, at_start: Callable[[str], None]
) -> None:
    at_start("import sys; sys.modules['onnxruntime'] = None")
    with pytest.raises(UserError, match=r"onnxruntime, which is not .*pip install onnxruntime"):
        measured(make_graph())


def test_what_can_be_refused_at_once_is(make_graph: MakeGraph, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        measured(tmp_path / "absent")
    with pytest.raises(UserError, match="for torch, give the run folder"):
        measured(make_graph(), runtime="torch")


def test_runtime_and_precision_are_those_asked_for(make_graph: MakeGraph) -> None:
    pytest.importorskip("openvino", reason="no openvino here: it was NOT measured")
    with pytest.raises(UserError, match="OpenVINO computes in fp32, bf16 or fp16, not in 'fp8'"):
        measured(make_graph(), runtime="openvino", precision="fp8")


def test_a_run_is_measured_in_torch(run_folder: Path) -> None:
    found = measured(run_folder)
    assert found.import_s > 0
    assert 0 < found.own_mib < found.peak_mib
