"""metrics.jsonl: what is written, and how it is cut back for a resumed run."""

import json
from pathlib import Path

import numpy as np
import pytest

from srdeploy.data import open_dataset, spec_for
from srdeploy.errors import UserError
from srdeploy.metrics import Score
from srdeploy.train.recorder import Recorder, cut_back, read_metrics

pytestmark = pytest.mark.wheel


def write(folder: Path, steps: int) -> Path:
    folder.mkdir(exist_ok=True)
    with Recorder(folder) as recorder:
        for step in range(1, steps + 1):
            recorder.train(step, 0.1, 1.5, {"main": 1.0}, 12.0)
    return folder / "metrics.jsonl"


def test_a_train_record_holds_step_rate_losses_and_speed(tmp_path: Path) -> None:
    (record,) = read_metrics(write(tmp_path, 1))
    assert record == {
        "kind": "train",
        "step": 1,
        "lr": 0.1,
        "loss": 1.5,
        "terms": {"main": 1.0},
        "images_per_s": 12.0,
    }


def test_a_validation_record_holds_the_scores(tiny_data: Path, tmp_path: Path) -> None:
    dataset = open_dataset(tiny_data, "val")
    score = Score(spec_for(dataset))
    _, labels = dataset.read(0)
    score.update(labels, np.where(labels == 2, 0, labels).astype(np.uint8))
    scores = score.result()
    with Recorder(tmp_path) as recorder:
        recorder.val(7, scores)
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (record["kind"], record["step"]) == ("val", 7)
    assert record["miou"] == scores.miou
    assert record["iou"]["disc"] == 0.0
    assert {"pixel_accuracy", "failure1", "failure2"} <= record.keys()


def test_records_are_on_the_disk_before_the_recorder_is_closed(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        recorder.train(1, 0.1, 1.5, {}, 12.0)
        assert len(read_metrics(recorder.path)) == 1


def test_resuming_keeps_what_lies_before_the_checkpoint_and_appends(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    kept = path.read_text().splitlines()[:3]
    with Recorder(tmp_path, resumed_at=3) as recorder:
        recorder.train(4, 0.5, 2.5, {}, 12.0)
    lines = path.read_text().splitlines()
    assert lines[:3] == kept
    assert [json.loads(line)["lr"] for line in lines] == [0.1, 0.1, 0.1, 0.5]


def test_a_last_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    path = write(tmp_path, 2)
    path.write_text(path.read_text() + '{"kind": "train", "st')
    cut_back(path, 10)
    assert [record["step"] for record in read_metrics(path)] == [1, 2]


def test_a_broken_line_in_the_middle_is_refused_by_its_number(tmp_path: Path) -> None:
    path = write(tmp_path, 2)
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 1 is not JSON"):
        cut_back(path, 10)
    path.write_text('{"kind": "train"}\n')
    with pytest.raises(UserError, match="line 1 is not a record with a step"):
        read_metrics(path)


def test_a_figure_that_is_not_a_number_is_never_written(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        with pytest.raises(ValueError, match="not JSON compliant"):
            recorder.train(1, 0.1, float("nan"), {}, 12.0)
        assert recorder.path.read_text() == ""
