"""What each runtime opens of an artifact, and what is made on the way."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from srdeploy.errors import UserError
from srdeploy.files import sha256_of, write_json
from srdeploy.graph.signature import read_signature
from srdeploy.runtimes.registry import open_runtime
from srdeploy.serve.bench.entries import Setting, every_setting
from srdeploy.spec import Spec
from srdeploy.studies.bench_entries import entries_for

MakeGraph = Callable[..., Path]

AUTO = Setting("auto", None, 1, None)


def deploy_of(run: Path, graph: Path, folder: Path) -> Path:
    """A deploy folder of `run` as an export would leave it, with this graph."""
    folder.mkdir(parents=True)
    shutil.copy(graph, folder / "model.onnx")
    weights = sha256_of(run / "network.safetensors")
    write_json(
        folder / "manifest.json",
        {"command": f"srdeploy export {run} --out {folder}", "weights_sha256": weights},
    )
    return folder


def test_torch_runs_the_checkpoint_of_a_graph(
    run_folder: Path, exported: dict[str, Path], tmp_path: Path
) -> None:
    deploy = deploy_of(run_folder, exported["uint8-labels"], tmp_path / "deploy")
    settings = every_setting(["onnxruntime", "torch"], [None], [1], [None])
    with entries_for([deploy], settings) as (entry,):
        assert [entry.file(one) for one in settings] == [deploy, run_folder]
        assert entry.checkpoint == run_folder


def test_torch_needs_to_know_the_run_of_a_graph(make_graph: MakeGraph) -> None:
    settings = every_setting(["torch"], [None], [1], [None])
    with (
        pytest.raises(UserError, match="give it with --checkpoint RUN"),
        entries_for([make_graph()], settings),
    ):
        raise AssertionError("not reached")


def test_exits_are_left_in_where_a_checkpoint_has_them(
    regulated_run: Path,
    exported: dict[str, Path],
    with_exits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def copy(run: Path, path: Path) -> None:
        """In place of a second export, which takes seconds."""
        assert run == regulated_run
        shutil.copy(with_exits, path)

    monkeypatch.setattr("srdeploy.studies.with_exits.export_with_exits", copy)
    deploy = deploy_of(regulated_run, exported["uint8-labels"], tmp_path / "deploy")
    with entries_for([deploy], [AUTO]) as found:
        assert [(one.name, one.judged) for one in found] == [
            ("deploy", True),
            ("exits left in", False),
        ]
        assert found[1].path.is_file()
    assert not found[1].path.exists()
    with entries_for([deploy], [AUTO], exits_left_in=False) as found:
        assert [one.name for one in found] == ["deploy"]
    with entries_for([deploy], [Setting("torch", None, 1, None)]) as found:
        assert [one.name for one in found] == ["deploy"]


def test_a_float32_graph_is_converted_for_runtimes_that_go_by_its_types(
    run_folder: Path, exported: dict[str, Path]
) -> None:
    graph = exported["uint8-labels"]
    settings = every_setting(["onnxruntime", "openvino"], ["fp32", "fp16"], [1], [None])
    with entries_for([graph], settings) as (entry,):
        files = [entry.file(one) for one in settings]
        assert files[0] == files[2] == files[3] == graph
        assert read_signature(files[1]).precision == "float16"
        with open_runtime(files[1]) as runtime:
            assert "float16" in runtime.precision


@pytest.mark.parametrize(
    ("precision", "message"),
    [("int8", "export it so"), ("fp8", "export it so")],
)
def test_what_takes_more_than_a_conversion_is_left_to_export(
    make_graph: MakeGraph, precision: str, message: str
) -> None:
    with (
        pytest.raises(UserError, match=message),
        entries_for([make_graph()], [Setting("onnxruntime", precision, 1, None)]),
    ):
        raise AssertionError("not reached")


def test_given_classes_are_for_files_without_their_own(
    make_graph: MakeGraph, tiny_spec: Spec
) -> None:
    ours, foreign = make_graph("ours.onnx"), make_graph("foreign.onnx", spec=None)
    given = tiny_spec.model_copy(update={"mean": (0.5, 0.5, 0.5)})
    with entries_for([ours, foreign], [AUTO], spec=given) as found:
        assert [one.spec for one in found] == [None, given]
    with entries_for([ours], [AUTO], spec=given) as (entry,):
        # Told to the runtime, which refuses it: leave --classes away.
        assert entry.spec == given
