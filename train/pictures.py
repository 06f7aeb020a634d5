"""Pictures of a run: photos kept for later checks, and grids of photo, truth and prediction."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from srdeploy.data import DataSet
from srdeploy.files import write_whole
from srdeploy.imaging import Pixels, colour_table, encode_png, fit, overlay, restore
from srdeploy.spec import Spec
from srdeploy.train.exit_views import label_map, run_exits
from srdeploy.train.regulation import SelfRegulation

SAMPLE_LIMIT = 8
"""Photos kept in samples/, for parity checks at export."""
ROWS = 4
"""Photos per grid."""
CELL = 240
"""Longest side of a cell, pixels."""
CAPTION = 16
"""Height of the line of captions, pixels."""
GAP = 4
"""Pixels between cells."""
NARROWEST = 72
"""Width of a column, pixels, in which any caption finds its place."""


def spread(count: int, limit: int) -> list[int]:
    """Up to `limit` indices out of `count`, evenly spaced from the first on."""
    wanted = min(count, limit)
    return [i * count // wanted for i in range(wanted)]


def sample_pictures(dataset: DataSet, spec: Spec) -> dict[str, bytes]:
    """File name -> PNG of a few photos of the split as the network sees them. Raises UserError."""
    pictures = {}
    for index in spread(len(dataset), SAMPLE_LIMIT):
        photo, _ = dataset.read(index)
        name = dataset.items[index].name.replace("/", "_")
        pictures[f"{name}.png"] = encode_png(fit(photo, spec))
    return pictures


def save_predictions(
    path: Path, regulated: SelfRegulation, dataset: DataSet, spec: Spec, with_exits: bool
) -> None:
    """Writes a grid: one photo per row; columns photo, truth, prediction, and every exit's if
    wanted.

    The module is put into evaluation mode for it, and back.
    """
    training = regulated.training
    regulated.eval()
    rows = []
    captions: list[str] = []
    for index in spread(len(dataset), ROWS):
        photo, labels = dataset.read(index)
        predicted = predict_exits(regulated, fit(photo, spec), spec)
        columns = {"photo": photo, "truth": overlay(photo, labels, spec)}
        ways = {"prediction": predicted[-1]}
        if with_exits:
            ways |= {f"exit {i}": mask for i, mask in enumerate(predicted[:-1], start=1)}
        for caption, mask in ways.items():
            own = restore(mask, photo.shape[0], photo.shape[1])
            columns[caption] = overlay(photo, own, spec, opacity=0.6)
        captions = list(columns)
        rows.append([shrink(cell) for cell in columns.values()])
    regulated.train(training)
    write_whole(path, encode_png(grid(rows, captions, spec)))


def predict_exits(regulated: SelfRegulation, image: Pixels, spec: Spec) -> list[Pixels]:
    """Labels uint8 [H, W] of every exit, shallow to deep, the network's own last; image uint8 [H,
    W, 3]."""
    size = (image.shape[0], image.shape[1])
    outputs = run_exits(regulated, image, spec)
    return [label_map(logits, size, spec) for logits in outputs.logits]


def shrink(image: Pixels) -> Pixels:
    """The picture with its longest side at most CELL pixels."""
    picture = Image.fromarray(image)
    picture.thumbnail((CELL, CELL))
    return np.asarray(picture)


def grid(rows: Sequence[Sequence[Pixels]], captions: Sequence[str], spec: Spec) -> Pixels:
    """Cells uint8 [h, w, 3] on a white page uint8 [H, W, 3], captions above, the classes' colours
    below."""
    width = max(NARROWEST, *(cell.shape[1] for row in rows for cell in row))
    heights = [max(cell.shape[0] for cell in row) for row in rows]
    across = len(captions) * (width + GAP) + GAP
    legend = -(-spec.class_count * (CELL // 2) // across) * CAPTION
    page = Image.new(
        "RGB", (across, CAPTION + sum(heights) + GAP * len(rows) + GAP + legend), "white"
    )
    draw = ImageDraw.Draw(page)
    for column, caption in enumerate(captions):
        draw.text((GAP + column * (width + GAP), 2), caption, fill="black")
    top = CAPTION
    for row, height in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            page.paste(Image.fromarray(cell), (GAP + column * (width + GAP), top))
        top += height + GAP
    _draw_legend(draw, spec, top, across)
    return np.asarray(page)


def _draw_legend(draw: ImageDraw.ImageDraw, spec: Spec, top: int, across: int) -> None:
    """Swatch and name of each class, in as many lines as the page's width needs."""
    per_line = max(1, across // (CELL // 2))
    colours = colour_table(spec)
    for index, name in enumerate(spec.classes):
        line, place = divmod(index, per_line)
        left, above = GAP + place * (CELL // 2), top + line * CAPTION
        red, green, blue = (int(value) for value in colours[index])
        draw.rectangle((left, above + 3, left + 10, above + 13), fill=(red, green, blue))
        draw.text((left + 14, above + 2), name[:18], fill="black")
