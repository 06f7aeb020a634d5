"""Made-up photos whose tags a tiny network can learn: gray noise with a red box, a blue disc, both
or none."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 64
KINDS = ((), (1,), (2,), (1, 2))
NAMES = ["background", "box", "disc"]


def write_scenes(root: Path, masks: tuple[str, ...] = ("train", "val"), train: int = 12) -> Path:
    """The folder layout with classes.json and labels.csv; masks for the splits named."""
    rows = ["image,classes"]
    for split, count, seed in (("train", train, 0), ("val", 4, 1)):
        (root / "images" / split).mkdir(parents=True)
        for index in range(count):
            rng = np.random.default_rng([seed, index])
            shown = KINDS[index % len(KINDS)]
            photo, labels = _scene(rng, shown)
            name = f"{split}_{index:02d}.png"
            Image.fromarray(photo).save(root / "images" / split / name)
            if split in masks:
                (root / "labels" / split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(labels).save(root / "labels" / split / name)
            rows.append(f"{split}/{name},{';'.join(NAMES[one] for one in shown)}")
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    (root / "classes.json").write_text(json.dumps({"names": NAMES}))
    return root


def _scene(rng: np.random.Generator, shown: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    labels = np.zeros((SIDE, SIDE), np.uint8)
    if 1 in shown:
        top, left = (int(v) for v in rng.integers(2, 38, 2))
        labels[top : top + 22, left : left + 22] = 1
    if 2 in shown:
        rows, columns = np.mgrid[:SIDE, :SIDE]
        labels[np.hypot(rows - rng.integers(14, 50), columns - rng.integers(14, 50)) < 11] = 2
    colours = np.array([[120, 120, 120], [220, 40, 30], [40, 50, 210]])[labels]
    return np.clip(colours + rng.integers(-25, 26, (SIDE, SIDE, 3)), 0, 255).astype(
        np.uint8
    ), labels
