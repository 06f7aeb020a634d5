"""`srdeploy bench`: its exit code, its files, its words."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from srdeploy.data import open_dataset, spec_for
from srdeploy.serve.bench.matrix import Benchmark
from srdeploy.serve.bench.results import BenchReport, LatencyOutcome

Verb = Callable[..., tuple[int, str, str]]

BRIEF = ("--budget", 1, "--threads", 1, "--no-costs", "--size", "40x48")


@pytest.fixture
def graph(tmp_path: Path, tiny_data: Path) -> Path:
    """One 1x1 convolution whose logits are the colours: red, green and blue."""
    spec = spec_for(open_dataset(tiny_data, "val"))
    kernel = np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1]], np.float32).reshape(3, 3, 1, 1)
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["floats"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "kernel"], ["logits"]),
        helper.make_node("ArgMax", ["logits"], ["best"], axis=1, keepdims=0),
        helper.make_node("Cast", ["best"], ["labels"], to=TensorProto.UINT8),
    ]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "colour",
            [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", "H", "W", 3])],
            [helper.make_tensor_value_info("labels", TensorProto.UINT8, ["N", "H", "W"])],
            [numpy_helper.from_array(kernel, "kernel")],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=9,
    )
    model.metadata_props.add(key="srdeploy.spec", value=spec.to_json())
    path = tmp_path / "colour.onnx"
    onnx.save(model, str(path))
    return path


@pytest.fixture
def outcome(monkeypatch: pytest.MonkeyPatch) -> Callable[[LatencyOutcome], None]:
    """Sets what every verdict of a benchmark turns out to be; all else is real."""
    run = Benchmark.run

    def turn_out(wanted: LatencyOutcome) -> None:
        def patched(self: Benchmark, *arguments: Any) -> Any:
            report, photos = run(self, *arguments)
            content = report.model_dump()
            for cell in content["cells"]:
                for row in cell["rows"]:
                    if row["end_to_end"]["verdict"] is not None:
                        row["end_to_end"]["verdict"]["outcome"] = wanted
            return BenchReport.model_validate(content), photos

        monkeypatch.setattr(Benchmark, "run", patched)

    return turn_out


@pytest.mark.parametrize(
    ("wanted", "code"),
    [(LatencyOutcome.EQUIVALENT, 0), (LatencyOutcome.DIFFERENT, 1), (LatencyOutcome.NOT_SHOWN, 1)],
)
def test_only_equivalence_is_exit_code_0(
    srdeploy: Verb,
    graph: Path,
    outcome: Callable[[LatencyOutcome], None],
    wanted: LatencyOutcome,
    code: int,
) -> None:
    outcome(wanted)
    found, out, err = srdeploy("bench", graph, graph, *BRIEF)
    assert found == code
    assert re.search(f"{wanted.value}: ratio .*: colour.onnx \\(2\\) against colour.onnx", err)
    assert wanted.value in out


def test_one_artifact_alone_is_measured_without_a_verdict(srdeploy: Verb, graph: Path) -> None:
    code, out, _ = srdeploy("bench", graph, *BRIEF, "--json")
    assert code == 0
    (row,) = json.loads(out)["cells"][0]["rows"]
    assert row["end_to_end"]["verdict"] is None


def test_json_is_the_report_and_the_folder_holds_it_with_a_page(
    srdeploy: Verb, graph: Path, tiny_data: Path, tmp_path: Path
) -> None:
    words = ("--data", tiny_data, "--out", tmp_path / "out", "--markdown", "--json")
    code, out, _ = srdeploy("bench", graph, graph, *BRIEF, *words)
    assert code in (0, 1)
    report = json.loads(out)
    assert out.count("\n") == 1
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["accuracy"]["rows"][1]["scores"]["miou"] == 1.0
    assert f"srdeploy bench {graph}" in report["command"]
    page = (tmp_path / "out" / "report.html").read_text()
    verdict = report["cells"][0]["rows"][1]["end_to_end"]["verdict"]
    assert verdict["outcome"] in page
    assert "## Benchmark: " in (tmp_path / "out" / "report.md").read_text()


def test_markdown_goes_to_stdout_on_request(srdeploy: Verb, graph: Path) -> None:
    _, out, _ = srdeploy("bench", graph, *BRIEF, "--markdown")
    assert out.startswith("## Benchmark: ")


def test_several_settings_make_a_matrix(srdeploy: Verb, graph: Path) -> None:
    words = ("--budget", 1, "--threads", 1, "--no-costs", "--json")
    matrix = ("--runtime", "onnxruntime,openvino", "--batch", "1,2", "--size", "32x32,40x48")
    code, out, _ = srdeploy("bench", graph, *words, *matrix)
    assert code == 0
    cells = json.loads(out)["cells"]
    assert [(one["runtime"], one["batch"], one["size"]) for one in cells] == [
        (runtime, batch, size)
        for runtime in ("onnxruntime", "openvino")
        for batch in (1, 2)
        for size in ([32, 32], [40, 48])
    ]


def test_the_margin_is_given_in_percent(srdeploy: Verb, graph: Path) -> None:
    _, out, _ = srdeploy("bench", graph, *BRIEF, "--margin", "2.5", "--json")
    assert json.loads(out)["cells"][0]["margin"] == pytest.approx(0.025)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("{tmp}/none.onnx",), "no such file or folder"),
        (("{graph}", "--size", "big"), "--size 'big': height x width in pixels"),
        (("{graph}", "--size", "8x8"), "at least"),
        (("{graph}", "--batch", "1,x"), "--batch 'x': a number of images"),
        (("{graph}", "--batch", "1,,2"), "an entry between the commas is empty"),
        (("{graph}", "--batch", "2,2"), "an entry is given twice"),
        (("{graph}", "--runtime", "onnxruntim"), "did you mean 'onnxruntime'?"),
        (("{graph}", "--runtime", "tensorrt"), "tensorrt"),
        (("{graph}", "--device", "cuda"), "cuda"),
        (("{graph}", "--checkpoint", "{tmp}"), "is not a run folder"),
        (("{graph}", "--precision", "int8"), "srdeploy export RUN --precision int8"),
        (("{graph}", "--out", "{graph}"), "is a file: give a folder"),
        (("{graph}", "--data", "{tmp}/none"), "no such data folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    srdeploy: Verb, graph: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    given = [word.format(tmp=tmp_path, graph=graph) for word in words]
    code, out, err = srdeploy("bench", *given, "--no-costs", "--quiet")
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_help_shows_examples_and_says_what_the_verdicts_mean(srdeploy: Verb) -> None:
    code, out, _ = srdeploy("bench", "--help")
    told = " ".join(out.split())
    assert code == 0
    assert "Example: srdeploy bench deploy/baseline deploy/regulated" in told
    for outcome in LatencyOutcome:
        assert outcome.value in told
