"""Synthetic scenes for the two failures of segmentation, in the folder layout.

*Failure-1*, small things are missed: deer, sheep and herons have thin legs and often stand far
away. *Failure-2*, parts of large things get another class: cow and buffalo share figure and coats,
so that only the fence or the water elsewhere in the picture tells whose hide a patch is.

One seed gives the same bytes on every run of the same Pillow and numpy; a scene depends on the
seed, its split and its number only, so that asking for more scenes keeps the earlier ones.
"""

from pathlib import Path

import numpy as np

from srdeploy import console
from srdeploy.data.classes import CLASSES_FILE, ClassTable
from srdeploy.data.scenery import (
    VOID,
    Canvas,
    Stage,
    paint_animal,
    paint_fence,
    paint_land,
    paint_water,
)
from srdeploy.errors import UserError
from srdeploy.files import read_json, whole_folder, write_json
from srdeploy.imaging import Pixels, encode_jpeg, encode_mask
from srdeploy.spec import Spec

CLASSES = ClassTable(
    names=("background", "water", "fence", "cow", "buffalo", "deer", "sheep", "heron"),
    palette=(
        (40, 44, 52),
        (66, 146, 198),
        (196, 148, 84),
        (214, 72, 64),
        (128, 84, 190),
        (240, 176, 48),
        (240, 236, 222),
        (84, 190, 140),
    ),
    ignore_index=VOID,
)
"""The classes of the synthetic scenes."""

MADE_BY = "srdeploy data synth"
LEAST_SIDE = 64
"""Smaller scenes would have animals of a few pixels."""

_SPLIT_KEYS = {"train": 0, "val": 1, "test": 2}
_SMALL = ("deer", "sheep", "heron")


def synthesise(
    folder: Path,
    *,
    train: int = 200,
    val: int = 40,
    test: int = 40,
    width: int = 160,
    height: int = 120,
    seed: int = 0,
    force: bool = False,
) -> None:
    """Writes a data set of synthetic scenes to `folder`, which appears whole.

    `train`, `val` and `test` are numbers of scenes (a split of 0 is left out); width and height are
    pixels. `force` replaces an older set of synthetic scenes, never anything else.
    Raises UserError where `folder` is taken or a size or number can't be used.
    """
    counts = {"train": train, "val": val, "test": test}
    if min(counts.values()) < 0 or not any(counts.values()):
        raise UserError(f"numbers of scenes {counts}: none may be negative, one must be positive")
    if min(width, height) < LEAST_SIDE:
        least = f"{LEAST_SIDE}x{LEAST_SIDE}"
        raise UserError(f"scenes of {width}x{height}: at least {least} are needed")
    if seed < 0:
        raise UserError(f"seed {seed}: it must be 0 or more")
    _refuse_taken(folder, force)
    spec = Spec(classes=CLASSES.names, palette=CLASSES.palette, void_colour=CLASSES.void_colour)
    jobs = [(split, number) for split, count in counts.items() for number in range(count)]
    with whole_folder(folder) as place:
        notes = {"made_by": MADE_BY, "seed": seed, "size": [width, height], "splits": counts}
        table = CLASSES.model_dump(mode="json", exclude={"scored"})
        write_json(place / CLASSES_FILE, table | notes)
        for split, number in console.track(jobs, "painting scenes"):
            random = np.random.default_rng([seed, _SPLIT_KEYS[split], number])
            photo, labels = scene(random, height, width)
            name = f"scene_{number:05d}"
            photos, masks = place / "images" / split, place / "labels" / split
            for made in (photos, masks):
                made.mkdir(parents=True, exist_ok=True)
            (photos / f"{name}.jpg").write_bytes(encode_jpeg(photo, quality=92))
            (masks / f"{name}.png").write_bytes(encode_mask(labels, spec))


def scene(random: np.random.Generator, height: int, width: int) -> tuple[Pixels, Pixels]:
    """One scene: photo uint8 [height, width, 3] and labels uint8 [height, width]."""
    canvas = Canvas(height, width)
    stage = paint_land(canvas, random)
    kind = ("cow", "buffalo")[random.integers(2)]
    if kind == "buffalo":
        border = paint_water(canvas, random, stage)
    else:
        border = stage.horizon + round((height - stage.horizon) * random.uniform(0.22, 0.4))
    cast = [*_distant(random, stage, canvas), *_near(random, stage, canvas, kind, border)]
    cast.sort(key=lambda actor: actor[1])
    # Far to near: what stands behind the fence is seen through it.
    beyond = [actor for actor in cast if actor[1] < border]
    _paint_cast(canvas, random, stage, beyond)
    if kind == "cow":
        paint_fence(canvas, random, stage, border)
    _paint_cast(canvas, random, stage, cast[len(beyond) :])
    return canvas.pixels(random), canvas.labels


Actor = tuple[str, float, float, float]
"""Name, row and column of the feet, height in pixels."""


def _paint_cast(
    canvas: Canvas, random: np.random.Generator, stage: Stage, cast: list[Actor]
) -> None:
    height = canvas.labels.shape[0]
    for name, row, column, tall in cast:
        depth = (row - stage.horizon) / (height - stage.horizon)
        haze = 0.5 * max(0.0, 1 - 1.6 * depth)
        label = CLASSES.names.index(name)
        paint_animal(canvas, random, stage, name, label, (row, column), tall, haze)


def _distant(random: np.random.Generator, stage: Stage, canvas: Canvas) -> list[Actor]:
    """Small animals between horizon and middle ground; their size goes by distance."""
    height, width = canvas.labels.shape
    room = height - stage.horizon
    actors: list[Actor] = []
    for _ in range(random.integers(2, 6)):
        depth = random.uniform(0.06, 0.5)
        tall = height * (0.07 + 0.22 * depth) * random.uniform(0.85, 1.15)
        column = random.uniform(0.04, 0.96) * width
        name = _SMALL[random.integers(len(_SMALL))]
        actors.append((name, stage.horizon + depth * room, column, tall))
    return actors


def _near(
    random: np.random.Generator, stage: Stage, canvas: Canvas, kind: str, border: int
) -> list[Actor]:
    """One or two of the look-alikes in the foreground, and at times a small animal beside them."""
    height, width = canvas.labels.shape
    actors: list[Actor] = []
    for _ in range(1 + (random.random() < 0.35)):
        row = random.uniform(min(max(border + height * 0.1, height * 0.8), height), height)
        tall = height * random.uniform(0.4, 0.62)
        actors.append((kind, row, random.uniform(0.22, 0.78) * width, tall))
    if random.random() < 0.6:
        name = _SMALL[random.integers(len(_SMALL))]
        row = random.uniform(height * 0.72, height * 0.97)
        tall = height * random.uniform(0.22, 0.36)
        actors.append((name, row, random.uniform(0.06, 0.94) * width, tall))
    return actors


def _refuse_taken(folder: Path, force: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    table = folder / CLASSES_FILE
    content = read_json(table) if table.is_file() else None
    if not isinstance(content, dict) or content.get("made_by") != MADE_BY:
        raise UserError(f"{folder} exists and holds no synthetic scenes: choose another folder")
    if not force:
        raise UserError(f"{folder} holds synthetic scenes already: --force replaces them")
