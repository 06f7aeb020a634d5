"""Evaluation: known answers, sizes restored, and class lists that must agree."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from srdeploy.data import open_dataset
from srdeploy.errors import UserError
from srdeploy.imaging import fit
from srdeploy.runtimes.registry import open_runtime
from srdeploy.serve.evaluate import evaluate
from srdeploy.spec import InputPolicy, Spec

MakeGraph = Callable[..., Path]


def test_a_network_that_is_right_scores_one(make_graph: MakeGraph, tiny_data: Path) -> None:
    with open_runtime(make_graph()) as runtime:
        scores = evaluate(runtime, open_dataset(tiny_data, "val"))
    assert (scores.miou, scores.pixel_accuracy, scores.images) == (1.0, 1.0, 3)
    assert scores.iou == {"field": 1.0, "box": 1.0, "disc": 1.0}


def test_a_wrong_network_scores_what_numpy_counts(make_graph: MakeGraph, tiny_data: Path) -> None:
    """Boxes called discs and discs boxes: only the field is right."""
    shutil.copytree(tiny_data, work := make_graph().parent / "swapped")
    for path in (work / "labels" / "val").iterdir():
        labels = np.asarray(Image.open(path))
        swap = np.arange(256, dtype=np.uint8)
        swap[[1, 2]] = 2, 1
        Image.fromarray(swap[labels]).save(path)
    with open_runtime(make_graph()) as runtime:
        scores = evaluate(runtime, open_dataset(work, "val"))
    assert scores.iou == {"field": 1.0, "box": 0.0, "disc": 0.0}
    assert scores.miou == pytest.approx(1 / 3)


def test_the_limit_takes_the_first_photos(make_graph: MakeGraph, tiny_data: Path) -> None:
    with open_runtime(make_graph()) as runtime:
        assert evaluate(runtime, open_dataset(tiny_data, "train"), limit=2).images == 2
        assert evaluate(runtime, open_dataset(tiny_data, "train"), limit=99).images == 6


def test_labels_are_compared_at_the_masks_own_size(
    make_graph: MakeGraph, tiny_data: Path, tiny_spec: Spec
) -> None:
    policy = InputPolicy(longest_side=96, smallest=(32, 32), usual=(80, 96), largest=(96, 96))
    graph = make_graph(spec=tiny_spec.model_copy(update={"input": policy}), size=(1, 80, 96))
    dataset = open_dataset(tiny_data, "val")
    with open_runtime(graph) as runtime:
        assert fit(dataset.read(0)[0], runtime.spec).shape == (80, 96, 3)
        scores = evaluate(runtime, dataset)
    assert scores.miou > 0.95


def test_what_is_ignored_and_scored_the_data_set_says(
    make_graph: MakeGraph, tiny_data: Path, tiny_spec: Spec
) -> None:
    """The artifact was trained with another ignored label and scored other classes."""
    shutil.copytree(tiny_data, work := make_graph().parent / "subset")
    table = json.loads((work / "classes.json").read_text())
    (work / "classes.json").write_text(json.dumps(table | {"scored": [0, 2]}))
    own = tiny_spec.model_copy(update={"ignore_index": 254, "scored": (1,)})
    with open_runtime(make_graph(spec=own)) as runtime:
        scores = evaluate(runtime, open_dataset(work, "val"))
    assert scores.iou == {"field": 1.0, "disc": 1.0}


def test_a_run_and_its_export_score_alike(
    run_folder: Path, exported: dict[str, Path], tiny_data: Path
) -> None:
    dataset = open_dataset(tiny_data, "val")
    with open_runtime(run_folder) as run, open_runtime(exported["uint8-labels"]) as export:
        checkpoint, file = evaluate(run, dataset), evaluate(export, dataset)
    assert file.miou == pytest.approx(checkpoint.miou, abs=1e-3)


def test_another_number_of_classes_is_refused_with_both(
    make_graph: MakeGraph, tiny_data: Path
) -> None:
    two = Spec(classes=("cat", "dog"), palette=((0, 0, 0), (9, 9, 9)))
    message = r"colour\.onnx has 2 classes \(cat, dog\), .* has 3 \(field, box, disc\)"
    with (
        open_runtime(make_graph(spec=two)) as runtime,
        pytest.raises(UserError, match=message),
    ):
        evaluate(runtime, open_dataset(tiny_data, "val"))


def test_another_order_of_classes_is_refused(
    make_graph: MakeGraph, tiny_data: Path, tiny_spec: Spec
) -> None:
    turned = tiny_spec.model_copy(update={"classes": ("box", "field", "disc")})
    with (
        open_runtime(make_graph(spec=turned)) as runtime,
        pytest.raises(UserError, match="class 0 is 'box' in .* and 'field' in"),
    ):
        evaluate(runtime, open_dataset(tiny_data, "val"))


def test_a_photo_of_a_wrong_size_is_named(make_graph: MakeGraph, tiny_data: Path) -> None:
    with (
        open_runtime(make_graph(size=(1, 64, 64))) as runtime,
        pytest.raises(UserError, match=r"val_00\.png: .* not \[1, 40, 48, 3\]"),
    ):
        evaluate(runtime, open_dataset(tiny_data, "val"))
