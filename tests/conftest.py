"""Fixtures that several parts share: a tiny data set, written with Pillow, that a tiny network can
learn."""

import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

LONGEST = ("test_readme.py", "test_every_network.py", "test_demo.py")
"""Files that take minutes: with several workers they must not be the ones that come last."""

TINY_SIZE = (40, 48)
"""(height, width) of the tiny set's photos."""
TINY_PALETTE = [[40, 160, 60], [200, 60, 40], [40, 70, 200]]


@pytest.hookimpl(tryfirst=True)  # xdist's own hook reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker for each file, since its tests share what they made, and for each network in the
    file that takes all networks the whole way; the longest begin."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            call = getattr(item, "callspec", None)
            network = call.params.get("journey") if call is not None else None
            item.add_marker(pytest.mark.xdist_group(f"{item.path.name} {network or ''}".strip()))


def write_tiny_data(root: Path, train: int = 6, val: int = 3, seed: int = 0) -> Path:
    """The folder layout with classes field, box, disc; a void rim around the discs; noise on the
    colours."""
    for split, count, offset in (("train", train, 0), ("val", val, 1000)):
        (root / "images" / split).mkdir(parents=True)
        (root / "labels" / split).mkdir(parents=True)
        for index in range(count):
            rng = np.random.default_rng([seed, offset + index])
            photo, labels = _tiny_scene(rng)
            Image.fromarray(photo).save(root / "images" / split / f"{split}_{index:02d}.png")
            Image.fromarray(labels).save(root / "labels" / split / f"{split}_{index:02d}.png")
    table = {
        "names": ["field", "box", "disc"],
        "palette": TINY_PALETTE,
        "ignore_index": 255,
        "void_colour": [224, 224, 192],
    }
    (root / "classes.json").write_text(json.dumps(table))
    return root


def _tiny_scene(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    height, width = TINY_SIZE
    labels = np.zeros((height, width), np.uint8)
    top, left = (int(v) for v in rng.integers(2, 12, 2))
    labels[top : top + 14, left : left + 12] = 1
    rows, columns = np.mgrid[:height, :width]
    distance = np.hypot(rows - rng.integers(14, 30), columns - rng.integers(28, 40))
    labels[distance < 8] = 255
    labels[distance < 7] = 2
    colours = np.array([*TINY_PALETTE, *[[128, 128, 128]] * 253], np.int64)[labels]
    noise = rng.integers(-30, 31, (height, width, 3))
    return np.clip(colours + noise, 0, 255).astype(np.uint8), labels


@pytest.fixture(autouse=True)
def loud() -> Iterator[None]:
    """Verbs silence the console for the whole process: no test may inherit that from another."""
    from srdeploy import console

    console.set_quiet(False)
    yield
    console.set_quiet(False)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws without a seed of its own is the same whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:  # importing it takes seconds, and not all tests need it
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def srdeploy(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs `srdeploy ARGUMENTS` in this process; returns the exit code, stdout and stderr."""
    from srdeploy.cli.main import main

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["srdeploy", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        captured = capfd.readouterr()
        return int(exit.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A read-only data set in the folder layout: 3 classes, 6 train and 3 val photos of 48x40 (W x
    H)."""
    return write_tiny_data(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="session")
def browser_path() -> str:
    """A Chromium on this machine; without one the test is skipped, but not where CI insists."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        assert "SRDEPLOY_REQUIRE_BROWSER" not in os.environ, "CI must bring a browser"
        pytest.skip("no chromium on this machine: pages were NOT tested in a browser")
    return found
