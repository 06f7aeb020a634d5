"""The folder that `folder_soak.py` has predicted: how it is made, and what became of it."""

import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

OWN = ("classes.json", "legend.png", "manifest.jsonl")
"""Files of an output folder that are no masks."""
ODD = ("truncated", "empty", "text", "huge", "broken link", "loop")
PER_FOLDER = 500
"""Photos in one of its folders."""
HUGE = b"BM" + bytes(12) + b"\x28\0\0\0" + 2 * (60_000).to_bytes(4, "little") + b"\1\0\x18\0"
"""The header of a bitmap of 60000 x 60000 pixels."""


@dataclass(frozen=True)
class Folder:
    """Photos to be predicted, with what is expected of each."""

    path: Path
    originals: Path
    names: dict[str, str]
    """Name of each sound photo, as the manifest has it -> name of its original."""
    odd: dict[str, str]
    """Path of each odd file -> its kind."""


def make_folder(
    files: list[Path], work: Path, count: int, odd: int, shrink: int, rng: np.random.Generator
) -> Folder:
    """`count` sound photos and `odd` others in new folders below `work`."""
    folder, originals = work / "photos", work / "originals"
    originals.mkdir(parents=True)
    for file in files[:count]:
        with Image.open(file) as image:
            small = image.resize((image.width // shrink, image.height // shrink), reducing_gap=2.0)
            small.save(originals / f"{file.stem}.jpg", quality=90)
    sound = sorted(originals.iterdir())
    names: dict[str, str] = {}
    strange: dict[str, str] = {}
    order = np.array([True] * odd + [False] * count)
    rng.shuffle(order)
    for index, is_odd in enumerate(order):
        path = folder / f"{index // PER_FOLDER:03d}" / f"photo_{index:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_odd:
            kind = ODD[len(strange) % len(ODD)]
            make_odd(path, kind, sound[0].read_bytes())
            strange[str(path)] = kind
        else:
            original = sound[len(names) % len(sound)]
            os.link(original, path)
            names[str(path.relative_to(folder).with_suffix(""))] = original.stem
    return Folder(folder, originals, names, strange)


def make_odd(path: Path, kind: str, content: bytes) -> None:
    """One file that is no photo; content: of one that is."""
    if kind == "broken link":
        path.symlink_to("nowhere.jpg")
    elif kind == "loop":
        path.symlink_to(path.name)
    else:
        path.write_bytes(
            {
                "truncated": content[: len(content) // 2],
                "empty": b"",
                "text": b"not a photo",
                "huge": HUGE + bytes(100),
            }[kind]
        )


def look(folder: Folder, out: Path, expected: dict[str, str]) -> dict[str, Any]:
    """What lies in the output folder now."""
    text = (out / "manifest.jsonl").read_bytes() if (out / "manifest.jsonl").exists() else b""
    records = [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()[1:]]
    times = Counter(one["name"] for one in records if "error" not in one)
    in_force = {one["name"]: one for one in records if one["name"]}
    told = {one["photo"] for one in records if "error" in one}
    masks, leftovers, strangers = {}, 0, 0
    for path in (Path(above) / name for above, _, names in os.walk(out) for name in names):
        name = str(path.relative_to(out).with_suffix(""))
        if path.name.endswith(".part"):
            leftovers += 1
        elif name in folder.names and path.suffix == ".png":
            masks[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.parent != out or path.name not in OWN:
            strangers += 1
    sound = [
        one
        for name, one in in_force.items()
        if "error" not in one and outputs_are_true(name, one, masks)
    ]
    return {
        "masks": len(masks),
        "wrong_masks": sum(
            digest != expected[folder.names[name]] for name, digest in masks.items()
        ),
        "recorded": len(times),
        "recorded_truly": len(sound),
        "recorded_twice": sum(number > 1 for number in times.values()),
        "masks_not_recorded": len(masks.keys() - times.keys()),
        "odd_told": len(told & folder.odd.keys()),
        "others_told": len(told - folder.odd.keys()),
        "leftovers": leftovers,
        "other_files": strangers,
        "half_line": len(text) > text.rfind(b"\n") + 1,
    }


def outputs_are_true(name: str, record: dict[str, Any], masks: dict[str, str]) -> bool:
    """Whether a record's only output is the mask of that name, as it lies there."""
    digests = {path: output["sha256"] for path, output in record["outputs"].items()}
    return digests == {f"{name}.png": masks.get(name)}


def is_sound(found: dict[str, Any], count: int, odd: int) -> bool:
    """Whether a job that has ended left all of it, and nothing else."""
    wanted = {"masks": count, "recorded": count, "recorded_truly": count}
    wanted |= {"odd_told": odd, "reported": odd, "exit_code": int(odd > 0)}
    nothing = ("wrong_masks", "recorded_twice", "masks_not_recorded", "others_told", "leftovers")
    wanted |= dict.fromkeys((*nothing, "other_files", "half_line"), 0)
    return all(found[key] == value for key, value in wanted.items())
