"""What each exit of a trained network sees in one image: its features, its labels, its classes."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from srdeploy.data import DataSet
from srdeploy.deployable import Normalise, cut_logits, pad_images
from srdeploy.files import write_whole
from srdeploy.imaging import Pixels, colour_table, encode_png, fit, overlay, restore
from srdeploy.spec import Spec
from srdeploy.train.regulation import ExitOutputs, SelfRegulation

OUTPUT = "output"
"""Name of the last view: the network's own output."""
DARKEST, BRIGHTEST = 2.0, 98.0
"""Percentiles of a map's cells that get the ends of the colour scale: a few extreme cells, as
borders and transformers' register-like tokens have, would leave everything else black."""

Heat = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ExitView:
    """One exit's view of one image [H, W, 3]."""

    name: str
    """The tap's module, the network's own supervised head, or "output"."""
    role: Literal["tap", "own", "output"]
    channels: int
    """The channels of the map that the exit reads; for an output, its classes."""
    stride: int | None
    """Input pixels per cell of a tap, as its probe showed; None for outputs."""
    heat: Heat
    """[h, w] in 0..1, at the map's own grid. Of a tap: how far each cell's feature vector lies from
    the mean of all cells (`contrast`). Of an output: the winning class's probability."""
    size: tuple[int, int]
    """(H, W) of the image."""
    covered: tuple[int, int]
    """(height, width) in pixels that the cells of `heat` cover: the image's, and any padding at its
    bottom and right."""
    labels: Pixels | None
    """[H, W], the exit's segmentation; None where no segmenter was trained."""
    presence: tuple[float, ...] | None
    """K probabilities that a class is in the image; None where no classifier was trained."""
    agreement: float | None
    """Share of the pixels to which the exit and the network's output give one class."""

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the map, in cells."""
        return self.heat.shape[0], self.heat.shape[1]


@torch.no_grad()
def view_exits(
    regulated: SelfRegulation, image: Pixels, spec: Spec, trained: bool = True
) -> tuple[ExitView, ...]:
    """The views of all exits, shallow to deep: taps, the network's own heads, then its output.

    image: uint8 [H, W, 3], as `srdeploy.imaging.fit` gives it. regulated: in evaluation mode, with
    exits. trained: False where those are fresh and only show the taps' maps: they then say nothing.
    """
    assert regulated.exits is not None
    assert regulated.choice is not None
    maps: list[Tensor] = []
    with ExitStack() as hooks:
        for tap in regulated.exits.taps:
            hooks.enter_context(tap.register_forward_pre_hook(partial(_keep_input, maps)))
        outputs = run_exits(regulated, image, spec)
    size = (image.shape[0], image.shape[1])
    covered = spec.input.padded(size)
    settings = regulated.settings
    own = label_map(outputs.logits[-1], size, spec)
    classified = trained and settings.cls_weight > 0
    segmented = trained and settings.seg_weight > 0
    presence = [_probabilities(one) if classified else None for one in outputs.class_logits]
    views = []
    for index, (name, found) in enumerate(zip(regulated.taps, maps, strict=True)):
        labels = label_map(outputs.logits[index], size, spec) if segmented else None
        views.append(
            ExitView(
                name=name,
                role="tap",
                channels=found.shape[1],
                stride=regulated.choice.maps[index].stride,
                heat=contrast(found[0]),
                size=size,
                covered=covered,
                labels=labels,
                presence=presence[index],
                agreement=None if labels is None else float((labels == own).mean()),
            )
        )
    for name, logits in outputs.own.items():
        labels = label_map(logits, size, spec)
        views.append(_output_view(name, "own", logits, covered, labels, own, None))
    logits = outputs.logits[-1]
    views.append(_output_view(OUTPUT, "output", logits, covered, own, own, presence[-1]))
    return tuple(views)


@torch.no_grad()
def run_exits(regulated: SelfRegulation, image: Pixels, spec: Spec) -> ExitOutputs:
    """All exits' views of one image, uint8 [H, W, 3], padded where the spec asks for it."""
    device = next(regulated.network.parameters()).device
    normalise: nn.Module = Normalise(spec).to(device)
    images = normalise(torch.from_numpy(np.array(image))[None].to(device))
    outputs: ExitOutputs = regulated(pad_images(images, spec.input.multiple))
    return outputs


def contrast(features: Tensor) -> Heat:
    """features [C, h, w] -> [h, w] in 0..1: distance of each cell's vector from their mean vector.

    What is equal all over the image says nothing about where something is, so the mean is taken
    off; the distance is Euclidean over the channels. Cells at or below the 2nd percentile give 0,
    at or above the 98th 1. Each map has its own scale: the size of features is arbitrary (a
    following normalisation undoes it), so it can't be compared between layers or trainings. A map
    of equal cells gives 0 all over.
    """
    values = features.float()
    distances = (values - values.mean((1, 2), keepdim=True)).norm(dim=0).cpu().numpy()
    low, high = np.percentile(distances, [DARKEST, BRIGHTEST])
    if high <= low:
        low, high = distances.min(), distances.max()
    # Rounding leaves tiny distances in a map of equal cells: noise, which must not be stretched.
    if high - low <= 1e-6 * float(values.abs().max()):
        return np.zeros(distances.shape, np.float32)
    scaled: Heat = np.clip((distances - low) / (high - low), 0, 1).astype(np.float32)
    return scaled


def label_map(logits: Tensor, size: tuple[int, int], spec: Spec) -> Pixels:
    """Logits [1, K, h, w] -> labels uint8 [H, W] at `size`, as the deployed graph makes them."""
    full = cut_logits(logits, size, spec.input.multiple)
    labels: Pixels = full[0].argmax(0).to(torch.uint8).cpu().numpy()
    return labels


def _output_view(
    name: str,
    role: Literal["own", "output"],
    logits: Tensor,
    covered: tuple[int, int],
    labels: Pixels,
    own: Pixels,
    presence: tuple[float, ...] | None,
) -> ExitView:
    return ExitView(
        name=name,
        role=role,
        channels=logits.shape[1],
        stride=None,
        heat=logits[0].float().softmax(0).amax(0).cpu().numpy(),
        size=(labels.shape[0], labels.shape[1]),
        covered=covered,
        labels=labels,
        presence=presence,
        agreement=float((labels == own).mean()),
    )


def _probabilities(class_logits: Tensor) -> tuple[float, ...]:
    return tuple(class_logits[0].float().sigmoid().tolist())


def _keep_input(maps: list[Tensor], _module: nn.Module, args: Sequence[Any]) -> None:
    maps.append(args[0])


# Pictures of a run

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
