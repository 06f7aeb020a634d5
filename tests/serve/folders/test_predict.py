"""Folder prediction: what is written where, what is skipped, and what a failure leaves behind."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from srdeploy.data.classes import read_class_table
from srdeploy.errors import UserError
from srdeploy.imaging import Pixels, read_labels, read_photo
from srdeploy.serve import predict as predict_module
from srdeploy.serve.photos import find_photos, mask_path
from srdeploy.serve.predict import FEW, WINDOW, draw_legend, predict_folder, predict_photos
from srdeploy.serve.runtime import ImageShapeError, open_runtime
from srdeploy.serve.scheduling.sessions import Source, open_sessions
from srdeploy.spec import InputPolicy, Spec

MakeGraph = Callable[..., Path]


def save_photo(path: Path, height: int = 40, width: int = 48, seed: int = 0) -> Path:
    """A lossless photo of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def expected_mask(path: Path) -> Pixels:
    """What the colour graph says of a photo: the strongest of green, red, blue."""
    return np.asarray(read_photo(path)[..., [1, 0, 2]].argmax(-1), np.uint8)


def names_below(folder: Path) -> set[str]:
    """Relative paths of all files."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_masks_hold_the_class_ids_at_the_photos_own_sizes(
    make_graph: MakeGraph, tmp_path: Path, tiny_spec: Spec
) -> None:
    photos = [
        save_photo(tmp_path / "in" / name, 33 + index, 50 - index, index)
        for index, name in enumerate(["a.png", "deep/er/b.tif", "deep/c.d.bmp"])
    ]
    out = tmp_path / "out"
    with open_runtime(make_graph()) as runtime:
        summary = predict_folder(runtime, [tmp_path / "in"], out)
    masks = [out / "a.png", out / "deep/er/b.png", out / "deep/c.d.png"]
    for photo, mask in zip(photos, masks, strict=True):
        assert (read_labels(mask) == expected_mask(photo)).all()
        with Image.open(mask) as image:
            assert image.mode == "P"
            palette = image.getpalette()
        assert palette is not None
        assert palette[:9] == [part for colour in tiny_spec.palette for part in colour]
    assert (summary.images, summary.skipped) == (3, ())
    assert summary.images_per_s == pytest.approx(3 / summary.seconds)
    assert names_below(out) == {
        "a.png",
        "deep/er/b.png",
        "deep/c.d.png",
        "classes.json",
        "legend.png",
    }


def test_the_network_sees_the_fitted_photo_and_the_mask_has_the_photos_size(
    make_graph: MakeGraph, tmp_path: Path, tiny_spec: Spec
) -> None:
    policy = InputPolicy(longest_side=40, smallest=(32, 32), usual=(40, 40), largest=(40, 40))
    graph = make_graph(spec=tiny_spec.model_copy(update={"input": policy}), size=(1, 32, 40))
    save_photo(tmp_path / "in" / "big.png", 160, 200)
    with open_runtime(graph) as runtime:
        predict_folder(runtime, [tmp_path / "in"], tmp_path / "out")
    assert read_labels(tmp_path / "out" / "big.png").shape == (160, 200)


def test_overlays_are_pictures_of_the_photos_size(make_graph: MakeGraph, tmp_path: Path) -> None:
    save_photo(tmp_path / "in" / "sub" / "a.png", 64, 32)
    with open_runtime(make_graph()) as runtime:
        predict_folder(runtime, [tmp_path / "in"], tmp_path / "out", overlays=True)
    assert read_photo(tmp_path / "out" / "overlays" / "sub" / "a.jpg").shape == (64, 32, 3)


def test_classes_json_beside_the_masks_reads_as_a_class_table(
    make_graph: MakeGraph, tmp_path: Path, tiny_spec: Spec
) -> None:
    save_photo(tmp_path / "in" / "a.png")
    with open_runtime(make_graph()) as runtime:
        predict_folder(runtime, [tmp_path / "in"], tmp_path / "out")
    table = read_class_table(tmp_path / "out" / "classes.json")
    assert (table.names, table.palette) == (tiny_spec.classes, tiny_spec.palette)
    assert (table.ignore_index, table.scored) == (tiny_spec.ignore_index, tiny_spec.scored)


def test_the_legend_shows_every_class_colour(tiny_spec: Spec) -> None:
    shown = {tuple(colour) for colour in draw_legend(tiny_spec).reshape(-1, 3).tolist()}
    assert shown >= {*tiny_spec.palette, tiny_spec.void_colour}


def test_photos_that_can_not_be_used_are_skipped_with_the_reason(
    make_graph: MakeGraph, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = save_photo(tmp_path / "in" / "good.png")
    small = save_photo(tmp_path / "in" / "small.png", 31, 48)
    (tmp_path / "in" / "text.jpg").write_text("not a photo")
    (tmp_path / "in" / "cut.png").write_bytes(good.read_bytes()[:500])
    with open_runtime(make_graph()) as runtime:
        summary = predict_folder(runtime, [tmp_path / "in"], tmp_path / "out")
    reasons = {Path(skip.photo).name: skip.reason for skip in summary.skipped}
    assert set(reasons) == {"small.png", "text.jpg", "cut.png"}
    assert "48x31 is too small" in reasons["small.png"]
    assert "not a readable image" in reasons["text.jpg"]
    assert summary.images == 1
    assert names_below(tmp_path / "out") == {"good.png", "classes.json", "legend.png"}
    assert f"skipped {small}" in capsys.readouterr().err


def test_a_photo_that_the_fixed_shape_refuses_is_skipped(
    make_graph: MakeGraph, tmp_path: Path
) -> None:
    save_photo(tmp_path / "in" / "fits.png", 40, 48)
    save_photo(tmp_path / "in" / "odd.png", 40, 50)
    with open_runtime(make_graph(size=(1, 40, 48))) as runtime:
        summary = predict_folder(runtime, [tmp_path / "in"], tmp_path / "out")
    assert [Path(skip.photo).name for skip in summary.skipped] == ["odd.png"]
    assert summary.images == 1


def test_a_graph_that_takes_none_of_the_sizes_is_an_error(
    make_graph: MakeGraph, tmp_path: Path
) -> None:
    save_photo(tmp_path / "in" / "odd.png", 40, 50)
    with (
        open_runtime(make_graph(size=(1, 40, 48))) as runtime,
        pytest.raises(ImageShapeError, match=r"not \[1, 40, 50, 3\]"),
    ):
        predict_folder(runtime, [tmp_path / "in"], tmp_path / "out")


def test_photos_that_differ_in_their_suffix_alone_keep_it(tmp_path: Path) -> None:
    for name in ("a.png", "a.bmp", "b.png", "legend.png", "sub/a.png"):
        save_photo(tmp_path / "in" / name)
    out = tmp_path / "out"
    masks = {mask_path(out, photo).name for photo in find_photos([tmp_path / "in"], out)}
    assert masks == {"a.png.png", "a.bmp.png", "b.png", "legend.png.png", "a.png"}


def test_files_and_folders_mix_and_repeats_count_once(tmp_path: Path) -> None:
    first = save_photo(tmp_path / "in" / "a.png")
    save_photo(tmp_path / "in" / "b.png")
    single = save_photo(tmp_path / "elsewhere" / "c.png")
    photos = find_photos([tmp_path / "in", single, first], tmp_path / "out")
    assert [str(photo.name) for photo in photos] == ["a", "b", "c"]


def test_masks_of_an_earlier_run_and_hidden_files_are_no_photos(tmp_path: Path) -> None:
    for name in ("a.png", "masks/a.png", ".thumbs/a.png", "._a.png"):
        save_photo(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("")
    photos = find_photos([tmp_path / "in"], tmp_path / "in" / "masks")
    assert [photo.path.relative_to(tmp_path / "in") for photo in photos] == [Path("a.png")]


def test_two_folders_with_equal_names_are_refused(tmp_path: Path) -> None:
    save_photo(tmp_path / "one" / "a.png")
    save_photo(tmp_path / "two" / "a.png")
    with pytest.raises(UserError, match=r"one/a\.png and .*two/a\.png would get the same mask"):
        find_photos([tmp_path / "one", tmp_path / "two"], tmp_path / "out")


def test_masks_never_replace_the_photos(tmp_path: Path) -> None:
    photo = save_photo(tmp_path / "in" / "a.png")
    with pytest.raises(UserError, match="would replace a photo: give another folder than"):
        find_photos([photo], tmp_path / "in")


def test_masks_never_go_among_the_photos_where_the_next_run_would_find_them(tmp_path: Path) -> None:
    save_photo(tmp_path / "in" / "a.bmp")
    (tmp_path / "link").symlink_to("in")
    for out in (tmp_path / "in", tmp_path / "link", tmp_path / "in" / "sub" / ".."):
        with pytest.raises(UserError, match="holds the photos, and masks among them"):
            find_photos([tmp_path / "in"], out)
    assert find_photos([tmp_path / "in" / "a.bmp"], tmp_path / "in")  # named one by one: no harm


def test_sources_without_photos_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file or folder: .*absent"):
        find_photos([tmp_path / "absent"], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no photos in .*empty: \.bmp, \.jpeg"):
        find_photos([tmp_path / "empty"], tmp_path / "out")


def test_decoding_runs_ahead_by_a_bounded_number_of_photos(
    make_graph: MakeGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory must not grow with the folder: decoded minus written photos stay bounded."""
    for index in range(30):
        save_photo(tmp_path / "in" / f"{index:02d}.png", 32, 32)
    lock = threading.Lock()
    alive = most = 0
    prepare, finish = predict_module._PhotoFile.prepare, predict_module._PhotoFile.finish

    def counted_prepare(task: Any) -> Pixels:
        nonlocal alive, most
        with lock:
            alive += 1
            most = max(most, alive)
        return prepare(task)

    def counted_finish(task: Any, labels: Pixels) -> None:
        nonlocal alive
        finish(task, labels)
        with lock:
            alive -= 1

    monkeypatch.setattr(predict_module._PhotoFile, "prepare", counted_prepare)
    monkeypatch.setattr(predict_module._PhotoFile, "finish", counted_finish)
    with open_runtime(make_graph()) as runtime:
        predict_folder(runtime, [tmp_path / "in"], tmp_path / "out")
    assert alive == 0
    assert most <= WINDOW


def test_many_photos_are_shared_by_sessions_and_come_out_the_same(
    make_graph: MakeGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict_module, "usable_cores", lambda: 3)
    for index in range(3 * FEW):
        save_photo(tmp_path / "in" / f"{index:02d}.png", 32 + index % 3, 40, index)
    (tmp_path / "in" / "bad.jpg").write_text("not a photo")
    opened: list[int] = []

    def noted(source: Source, layout: Any) -> Any:
        opened.append(layout.sessions)
        return open_sessions(source, layout)

    monkeypatch.setattr("srdeploy.serve.predict.open_sessions", noted)
    summary = predict_photos(Source("colour", make_graph()), [tmp_path / "in"], tmp_path / "out")
    assert opened == [3]
    assert (summary.images, len(summary.skipped)) == (3 * FEW, 1)
    for index in range(3 * FEW):
        mask = read_labels(tmp_path / "out" / f"{index:02d}.png")
        assert (mask == expected_mask(tmp_path / "in" / f"{index:02d}.png")).all()


def test_a_disk_that_fills_up_leaves_nothing_half_written(
    make_graph: MakeGraph, tmp_path: Path
) -> None:
    """The file-size limit strikes inside write(), as a full disk does."""
    save_photo(tmp_path / "in" / "a.png", 32, 32)
    save_photo(tmp_path / "in" / "b.png", 300, 300)
    out = tmp_path / "out"
    command = ["predict", str(make_graph()), str(tmp_path / "in"), "--out", str(out)]
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000)); "
        f"sys.argv[1:] = {command!r}; from srdeploy.cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"error: {out / 'b.png'}: File too large" in done.stderr
    assert names_below(out) == {"a.png", "classes.json", "legend.png"}
    assert (read_labels(out / "a.png") == expected_mask(tmp_path / "in" / "a.png")).all()
    json.loads((out / "classes.json").read_text())
