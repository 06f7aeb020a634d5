"""A folder whose prediction is killed again and again: benchmarks/folder_soak.py, small."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
MakeGraph = Callable[..., Path]


@pytest.fixture
def folder_soak(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module benchmarks/folder_soak.py."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("folder_soak")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Seven JPEGs of noise in large squares."""
    folder = tmp_path / "given"
    folder.mkdir()
    for index in range(7):
        coarse = np.random.default_rng(index).integers(0, 256, (9, 12, 3), np.uint8)
        Image.fromarray(coarse).resize((96, 72), 0).save(folder / f"{index}.jpg")
    return sorted(folder.iterdir())


def test_four_kills_lose_nothing_spoil_nothing_and_do_no_recorded_photo_again(
    folder_soak: Any, make_graph: MakeGraph, files: list[Path], tmp_path: Path
) -> None:
    graph = make_graph(work=30)
    report = folder_soak.soak(
        graph, files, tmp_path / "work", count=300, odd=12, kills=4, seed=3, sample_s=0.02
    )
    assert report["sound"], report
    assert [one["killed"] for one in report["kills"]].count(True) >= 2
    done = [one["recorded"] for one in report["kills"]]
    assert done == sorted(done)
    assert 0 < done[-1] < 300
    told = folder_soak.table(report)
    assert "| to the end | 300 | 300 | 0 | 0 | 0 | 0 | no |" in told
    assert "300 photos of 96 x 72 and 12 odd files" in told
    memory = report["memory"]
    assert memory["peak_mib"] >= memory["end_mib"] > 20
    assert report["samples"][-1][1] > 200


def test_kills_are_spread_over_the_job_and_every_fifth_strikes_at_the_start(
    folder_soak: Any,
) -> None:
    points = folder_soak.kill_points(1000, 10, np.random.default_rng(0))
    photos = [point.photos for point in points]
    assert [index for index, count in enumerate(photos) if count == 0] == [4, 9]
    assert all(
        100 * index <= count < 100 * (index + 1) for index, count in enumerate(photos) if count
    )
    assert points != folder_soak.kill_points(1000, 10, np.random.default_rng(1))


def test_the_check_sees_a_wrong_mask_a_photo_done_twice_and_what_was_left(
    folder_soak: Any, make_graph: MakeGraph, files: list[Path], tmp_path: Path
) -> None:
    soaked_folder = import_module("soaked_folder")
    work = tmp_path / "work"
    folder = soaked_folder.make_folder(files, work, 20, 6, 1, np.random.default_rng(0))
    graph, out = make_graph(), work / "out"
    expected = folder_soak.expected_masks(graph, folder.originals, work / "expected")
    folder_soak.ended(folder_soak.start(graph, folder.path, out, work), work)
    found = soaked_folder.look(folder, out, expected)
    assert soaked_folder.is_sound(found | {"reported": 6, "exit_code": 1}, 20, 6)
    manifest = out / "manifest.jsonl"
    lines = manifest.read_text().splitlines()
    done = [line for line in lines[1:] if '"error"' not in line]
    manifest.write_text("\n".join([*lines, done[0], done[1][:40]]))
    masks = sorted((out / "000").iterdir())
    masks[0].write_bytes(masks[0].read_bytes()[:-5])
    masks[1].rename(masks[1].with_name(".srdeploy.0123456789ab.0.part"))
    found = soaked_folder.look(folder, out, expected)
    assert (found["masks"], found["wrong_masks"], found["recorded_twice"]) == (19, 1, 1)
    assert (found["recorded"], found["recorded_truly"]) == (20, 18)
    assert (found["leftovers"], found["half_line"]) == (1, True)


def test_the_slope_of_memory_is_that_of_the_second_half(folder_soak: Any) -> None:
    noise = np.random.default_rng(0).normal(0, 2**18, 200)
    samples = [
        (float(second), 100 * second, int(2**20 * max(100, second) * 0.5 + noise[second]))
        for second in range(200)
    ]
    slope, low, high = folder_soak.memory_figures(samples)["slope_mib_per_1000_photos"]
    assert low < 5 < high  # half a MiB a second, in which 100 photos are done
    assert high - low < 1
    flat = [(float(second), 100 * second, 2**27) for second in range(200)]
    assert folder_soak.memory_figures(flat)["slope_mib_per_1000_photos"] == [0, 0, 0]
    assert folder_soak.memory_figures(flat[:2])["slope_mib_per_1000_photos"] is None
