"""The verbs evaluate and predict: one JSON object, exit codes, one line for bad input."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from srdeploy.runs import load_network, open_run

MakeGraph = Callable[..., Path]
Verb = Callable[..., tuple[int, str, str]]


def only_json(out: str) -> dict[str, Any]:
    """stdout's one line, parsed."""
    assert out.count("\n") == 1
    value = json.loads(out)
    assert isinstance(value, dict)
    return value


def test_evaluate_prints_a_table_or_one_json_object(
    srdeploy: Verb, make_graph: MakeGraph, tiny_data: Path
) -> None:
    graph = make_graph()
    code, out, _ = srdeploy("evaluate", graph, tiny_data)
    assert code == 0
    assert "disc" in out
    assert "100.00" in out
    code, out, err = srdeploy("evaluate", graph, tiny_data, "--split", "train", "--json")
    found = only_json(out)
    assert (code, err) == (0, "")
    assert (found["miou"], found["images"], found["split"]) == (1.0, 6, "train")
    assert (found["backend"], found["precision"]) == ("onnxruntime", "float32")


def test_evaluate_takes_graphs_without_metadata_with_classes(
    srdeploy: Verb, make_graph: MakeGraph, tiny_data: Path
) -> None:
    graph = make_graph(spec=None, input="float32", output="logits")
    # Equal scales, so that normalising does not change which colour is the strongest.
    classes = graph.parent / "classes.json"
    table = json.loads((tiny_data / "classes.json").read_text())
    classes.write_text(json.dumps(table | {"mean": [0, 0, 0], "std": [1, 1, 1]}))
    code, out, _ = srdeploy("evaluate", graph, tiny_data, "--classes", classes, "--json")
    assert code == 0
    assert only_json(out)["miou"] == 1.0


def test_predict_exits_with_1_where_a_photo_was_skipped(
    srdeploy: Verb, make_graph: MakeGraph, tiny_data: Path, tmp_path: Path
) -> None:
    photos, graph = tiny_data / "images" / "val", make_graph()
    code, out, err = srdeploy("predict", graph, photos, "--out", tmp_path / "a")
    assert (code, out) == (0, "")
    assert "3 photos done in" in err
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8 nothing")
    code, out, err = srdeploy("predict", graph, photos, broken, "--out", tmp_path / "b", "--json")
    found = only_json(out)
    assert code == 1
    assert found["images"] == 3
    assert [skip["photo"] for skip in found["skipped"]] == [str(broken)]
    assert f"warning: skipped {broken}: not a readable image" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "{tmp}/none.onnx", "{data}"), "no such file or folder"),
        (("evaluate", "{graph}", "{tmp}/none"), "no such data folder"),
        (("evaluate", "{graph}", "{data}", "--split", "vall"), "did you mean 'val'?"),
        (("evaluate", "{graph}", "{data}", "--device", "cuda"), "device cuda was asked for"),
        (("evaluate", "{text}", "{data}"), "not an ONNX file"),
        (("evaluate", "{foreign}", "{data}"), "--classes classes.json"),
        (("evaluate", "{foreign}", "{data}", "--classes", "{tmp}/c.json"), "no such file"),
        (("predict", "{graph}", "--out", "{tmp}/out"), "no photos: give folders"),
        (
            ("predict", "{graph}", "{data}", "--out", "{tmp}/out", "--mask", "none"),
            "ask for at least one output",
        ),
        (
            ("predict", "{graph}", "{data}", "--out", "{tmp}/out", "--scales", "1,x"),
            "'scales.1' is",
        ),
        (("predict", "{graph}", "{data}", "--out", "{tmp}/out", "--tile", "64"), "--tile '64'"),
        (
            ("predict", "{graph}", "{data}", "--out", "{tmp}/out", "--set", "actors=2"),
            "--engine ray",
        ),
        (("predict", "{graph}", "{tmp}/none", "--out", "{tmp}/out"), "no such file or folder"),
        (("predict", "{graph}", "{tmp}/empty", "--out", "{tmp}/out"), "no photos in"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    srdeploy: Verb,
    make_graph: MakeGraph,
    tiny_data: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.onnx").write_text("no graph")
    names = {
        "tmp": tmp_path,
        "data": tiny_data,
        "graph": make_graph(),
        "foreign": make_graph("foreign.onnx", spec=None),
        "text": tmp_path / "text.onnx",
    }
    code, out, err = srdeploy(*(text.format(**names) for text in arguments), "--quiet")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert message in err


@pytest.mark.parametrize("verb", ["evaluate", "predict"])
def test_every_verb_shows_an_example(srdeploy: Verb, verb: str) -> None:
    code, out, _ = srdeploy(verb, "--help")
    assert code == 0
    assert f"Example: srdeploy {verb} " in " ".join(out.split())


def test_the_graph_with_exits_gives_the_plain_labels_and_every_exit(
    regulated_run: Path, with_exits: Path
) -> None:
    import numpy as np
    import onnxruntime
    import torch

    from srdeploy.deployable import Deployable

    network, spec = load_network(open_run(regulated_run)), open_run(regulated_run).spec
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 52, 3), dtype=np.uint8)
    session = onnxruntime.InferenceSession(str(with_exits), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    assert isinstance(network.stages, tuple)
    assert names == ["labels", *(f"exit{index + 1}" for index in range(len(network.stages)))]
    labels, *exits = session.run(None, {"images": images})
    with torch.inference_mode():
        plain = Deployable(network, spec)(torch.from_numpy(images)).numpy()
    assert (labels == plain).mean() > 0.999
    assert all(one.shape[:2] == (2, 3) for one in exits)
