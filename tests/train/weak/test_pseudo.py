"""From tags to a data set of pseudo masks: what is in it, how it resumes, what it refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from srdeploy.data import open_dataset
from srdeploy.data.check import check_dataset
from srdeploy.data.tags import open_tagged
from srdeploy.errors import UserError
from srdeploy.train.config import load_config
from srdeploy.train.guard import DivergenceGuard
from srdeploy.train.loop import train
from srdeploy.train.weak.pseudo import make_pseudo
from srdeploy.train.weak.pseudo_run import PseudoConfig, PseudoRun, load_pseudo_run
from tests.train.weak.scenes import write_scenes

TINY = {
    "network.options": {"width_mult": 0.25},
    "steps": 6,
    "batch": 4,
    "crop": "64x64",
    "device": "cpu",
    "workers": 1,
    "save_every": 3,
    "log_every": 3,
}
QUICK = {"scales": (1.0,), "flip": False, "pamr_dilations": (1, 2), "pamr_steps": 2}


def tiny_run(data: Path, maps: dict[str, Any] | None = None, **keys: Any) -> PseudoRun:
    own = {k: keys.pop(k) for k in ("labels_from_masks", "teacher") if k in keys}
    config = load_config(flags={**TINY, "data": data, **keys})
    return PseudoRun(classifier=config, pseudo=PseudoConfig(**{**QUICK, **(maps or {})}), **own)


def content(folder: Path) -> dict[str, bytes]:
    """Every file below, by its place; records of speed left out."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "metrics.jsonl" and "tensorboard" not in path.parts
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def made(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pseudo masks of the scenes; tests that change them work on `copied`."""
    folder = tmp_path_factory.mktemp("pseudo") / "made"
    assert make_pseudo(tiny_run(data), folder) is not None
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copied"))


def test_the_result_is_a_data_set_without_faults(made: Path) -> None:
    found = check_dataset(made)
    assert found.passed, found.faults
    assert found.splits["train"].images == 12
    assert found.splits["val"].images == 4


def test_no_mask_shows_a_class_that_the_tags_lack(data: Path, made: Path) -> None:
    tagged, masks = open_tagged(data, "train"), open_dataset(made, "train")
    for index, tags in enumerate(tagged.tags):
        shown = set(np.unique(masks.read(index)[1]).tolist())
        assert shown <= {0, *tags, 255}
    assert any(1 in masks.read(i)[1] or 2 in masks.read(i)[1] for i in range(len(masks)))


def test_val_keeps_its_true_masks(data: Path, made: Path) -> None:
    before, after = open_dataset(data, "val"), open_dataset(made, "val")
    assert all((before.read(i)[1] == after.read(i)[1]).all() for i in range(4))


def test_every_mask_has_its_confidence(made: Path) -> None:
    for path in (made / "labels/train").iterdir():
        mask = np.asarray(Image.open(path))
        sure = np.asarray(Image.open(made / "confidence/labels/train" / path.name))
        assert (sure[mask == 255] == 0).all()
        assert (sure[mask != 255] > 0).all()


def test_the_report_tells_the_miou_of_the_masks(data: Path, made: Path) -> None:
    truth, masks = open_dataset(data, "train"), open_dataset(made, "train")
    hits, unions, ignored = np.zeros(3), np.zeros(3), []
    for index in range(len(truth)):
        right, guess = truth.read(index)[1], masks.read(index)[1]
        sure = guess != 255
        ignored.append(1 - sure.mean())
        for one in range(3):
            hits[one] += ((right == one) & (guess == one)).sum()
            unions[one] += (((right == one) & sure) | (guess == one)).sum()
    report = json.loads((made / "pseudo/report.json").read_text())
    assert report["splits"]["train"]["mask"]["miou"] == pytest.approx((hits / unions).mean())
    assert report["splits"]["train"]["ignored"] == pytest.approx(np.mean(ignored))
    assert set(report["tags"]["f1"]) == {"box", "disc"}


def test_pictures_are_drawn(made: Path) -> None:
    with Image.open(made / "pseudo/contact-sheet.png") as sheet:
        assert sheet.size[0] > 5 * 64
    page = (made / "pseudo/worst.html").read_text()
    assert page.count("<img") == 12 * 5
    assert "train/train_" in page


def test_a_second_call_does_nothing_again(
    data: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(copied)
    for name in ("_classify", "_make_maps", "_make_masks"):
        monkeypatch.setattr(f"srdeploy.train.weak.pseudo.{name}", lambda *_: pytest.fail("again"))
    assert make_pseudo(tiny_run(data), copied) is not None
    assert content(copied) == before


class Killed(Exception):
    pass


def killed_in_step(step: int) -> Callable[..., None]:
    look = DivergenceGuard.look

    def die(self: DivergenceGuard, terms: Any, at: int) -> None:
        if at == step:
            raise Killed
        look(self, terms, at)

    return die


def test_a_killed_classifier_goes_on_bit_for_bit(
    data: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(DivergenceGuard, "look", killed_in_step(5))
        with pytest.raises(Killed):
            make_pseudo(tiny_run(data), tmp_path / "again")
    assert (tmp_path / "again/pseudo/classifier-state.pt").exists()
    make_pseudo(tiny_run(data), tmp_path / "again")
    name = "pseudo/classifier.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (made / name).read_bytes()
    assert content(tmp_path / "again/labels") == content(made / "labels")


@pytest.mark.parametrize("victim", ["averaged_maps", "refined"])
def test_killed_maps_and_masks_go_on_with_what_is_missing(
    data: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    folder = tmp_path / "again"
    calls = []
    act = getattr(__import__("srdeploy.train.weak.pseudo", fromlist=[victim]), victim)

    def dies_at_the_third(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return act(*args)

    run = tiny_run(data, {"batch": 2})
    with monkeypatch.context() as patch:
        patch.setattr(f"srdeploy.train.weak.pseudo.{victim}", dies_at_the_third)
        with pytest.raises(Killed):
            make_pseudo(run, folder)
    done = len(list((folder / "pseudo/maps").rglob("*.npz"))) if victim == "averaged_maps" else 12
    assert done == (4 if victim == "averaged_maps" else 12)
    make_pseudo(run, folder)
    assert content(folder / "labels") == content(made / "labels")
    assert content(folder / "pseudo/scores") == content(made / "pseudo/scores")


def test_another_background_makes_the_masks_alone_anew(data: Path, copied: Path) -> None:
    before = content(copied)
    make_pseudo(tiny_run(data, {"background": 0.6}), copied)
    after = content(copied)
    changed = {name.split("/")[0] for name in before if before[name] != after[name]}
    assert "labels" in changed
    same = [n for n in before if "/maps/" in n or n.endswith(".safetensors")]
    assert len(same) == 13
    assert all(before[name] == after[name] for name in same)


def test_other_scales_make_the_maps_anew(data: Path, copied: Path) -> None:
    before = content(copied / "pseudo/maps")
    make_pseudo(tiny_run(data, {"scales": (1.0, 2.0)}), copied)
    assert content(copied / "pseudo/maps") != before


def test_another_classifier_is_refused_by_key_and_trained_by_force(
    data: Path, copied: Path
) -> None:
    other = tiny_run(data, lr=0.02)
    with pytest.raises(
        UserError, match=r"trained with lr=0\.01, not 0\.02: --force trains it anew"
    ):
        make_pseudo(other, copied)
    before = (copied / "pseudo/classifier.safetensors").read_bytes()
    make_pseudo(other, copied, force=True)
    assert (copied / "pseudo/classifier.safetensors").read_bytes() != before


def test_other_tags_are_another_classifier(data: Path, copied: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(data, tmp_path / "moved"))
    rows = (moved / "labels.csv").read_text()
    (moved / "labels.csv").write_text(rows.replace("train_01.png,box", "train_01.png,disc"))
    with pytest.raises(UserError, match="trained on other photos or tags"):
        make_pseudo(tiny_run(moved), copied)


def test_moved_data_are_the_same_data(data: Path, copied: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(data, tmp_path / "moved"))
    before = content(copied / "labels")
    make_pseudo(tiny_run(moved), copied)
    assert content(copied / "labels") == before


def test_steps_can_be_run_one_by_one(data: Path, made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "steps"
    with pytest.raises(UserError, match="step 'classify' is not done.*run it first"):
        make_pseudo(tiny_run(data), folder, only="masks")
    for step in ("classify", "maps", "masks"):
        make_pseudo(tiny_run(data), folder, only=step)
    assert content(folder / "labels") == content(made / "labels")


def test_a_folder_remembers_its_settings(made: Path, data: Path) -> None:
    found = load_pseudo_run(made, None, {}, ["pseudo.background=0.3", "log_every=1"])
    assert found.classifier.steps == 6
    assert found.classifier.data == data
    assert found.pseudo.scales == (1.0,)
    assert found.pseudo.background == 0.3


def test_a_foreign_folder_is_left_alone(data: Path, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no pseudo masks of ours"):
        make_pseudo(tiny_run(data), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_without_true_masks_there_is_no_score_and_val_gets_pseudo_masks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_scenes(tmp_path / "tagged", masks=())
    report = make_pseudo(tiny_run(data), tmp_path / "made")
    assert report is not None
    assert set(report["splits"]) == {"train", "val"}
    assert "mask" not in report["splits"]["train"]
    assert "split 'val' has no masks: it gets pseudo masks too" in capsys.readouterr().err
    assert check_dataset(tmp_path / "made").passed


def test_tags_of_masks_need_no_file(tmp_path: Path, made: Path) -> None:
    data = write_scenes(tmp_path / "masked")
    (data / "labels.csv").unlink()
    make_pseudo(tiny_run(data, labels_from_masks=True), tmp_path / "made")
    assert content(tmp_path / "made/labels") == content(made / "labels")


def test_a_trained_network_teaches_the_next_round(data: Path, made: Path, tmp_path: Path) -> None:
    keys = {**TINY, "data": made, "val_every": 6}
    train(load_config(flags=keys), tmp_path / "run")
    run = tiny_run(data, teacher=tmp_path / "run")
    report = make_pseudo(run, tmp_path / "second")
    assert report is not None
    assert "tags" not in report
    assert not (tmp_path / "second/pseudo/classifier.safetensors").exists()
    tagged, masks = open_tagged(data, "train"), open_dataset(tmp_path / "second", "train")
    for index, tags in enumerate(tagged.tags):
        assert set(np.unique(masks.read(index)[1]).tolist()) <= {0, *tags, 255}
    with pytest.raises(UserError, match="a teacher takes the classifier's place"):
        make_pseudo(run, tmp_path / "second", only="classify")


def test_a_key_that_the_classifier_does_not_use_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ema is not used in training the classifier"):
        make_pseudo(tiny_run(data, ema=0.9), tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_there_leave_nothing_behind(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no-such\.safetensors"):
        make_pseudo(tiny_run(data, pretrained="no-such.safetensors"), tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_of_other_classes_is_refused(tiny_data: Path, data: Path, tmp_path: Path) -> None:
    train(load_config(flags={**TINY, "data": tiny_data, "crop": "32x32"}), tmp_path / "run")
    with pytest.raises(UserError, match=r"knows other classes \(field, box, disc\)"):
        make_pseudo(tiny_run(data, teacher=tmp_path / "run"), tmp_path / "made")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("way", ["walk", "none"])
def test_masks_are_refined_by_choice(data: Path, copied: Path, made: Path, way: str) -> None:
    make_pseudo(tiny_run(data, {"refine": way}), copied)
    assert content(copied / "labels") != content(made / "labels")
