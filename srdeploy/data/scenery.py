"""The stage of the made-up scenes: sky, hills, ground, water and fences.

A `Canvas` holds photo and labels side by side; everything is painted on it through a coverage map,
so that the mask is exactly what was painted. H height, W width of the canvas, in pixels.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from scipy import ndimage

Floats = npt.NDArray[np.float32]
Colour = tuple[float, float, float]

BACKGROUND, WATER, FENCE = 0, 1, 2
VOID = 255
FINE = 4
"""Shapes are drawn this many times finer than the canvas, then averaged: smooth, thin legs."""


class Canvas:
    """A photo float32 [H, W, 3] in 0..255 and its labels uint8 [H, W], painted together."""

    def __init__(self, height: int, width: int) -> None:
        self.photo: Floats = np.zeros((height, width, 3), np.float32)
        self.labels = np.full((height, width), BACKGROUND, np.uint8)

    def paint(self, top: int, left: int, colours: Floats, coverage: Floats, label: int) -> None:
        """Lays a patch over photo and labels, with its upper left corner at (top, left).

        colours float32 [h, w, 3]; coverage float32 [h, w] in 0..1: at least half covered is
        `label`, and a ring of one pixel outside is void. Parts outside the canvas are cut off.
        """
        height, width = self.labels.shape
        rows = slice(max(0, -top), min(coverage.shape[0], height - top))
        columns = slice(max(0, -left), min(coverage.shape[1], width - left))
        if rows.start >= rows.stop or columns.start >= columns.stop:
            return
        inside = coverage >= 0.5
        ring = (ndimage.binary_dilation(inside, np.ones((3, 3), np.bool_)) & ~inside)[rows, columns]
        inside, share = inside[rows, columns], coverage[rows, columns, None]
        there = (
            slice(top + rows.start, top + rows.stop),
            slice(left + columns.start, left + columns.stop),
        )
        self.photo[there] = self.photo[there] * (1 - share) + colours[rows, columns] * share
        self.labels[there][ring] = VOID
        self.labels[there][inside] = label

    def shade(self, centre: tuple[float, float], radii: tuple[float, float], depth: float) -> None:
        """Darkens the photo softly around (row, column) by up to `depth` (0..1): a shadow."""
        height, width = self.labels.shape
        rows = (np.arange(height, dtype=np.float32)[:, None] - centre[0]) / max(radii[0], 1)
        columns = (np.arange(width, dtype=np.float32)[None, :] - centre[1]) / max(radii[1], 1)
        dark = depth * np.clip(1.2 - rows**2 - columns**2, 0, 1)
        self.photo *= (1 - dark)[..., None]

    def pixels(self, random: np.random.Generator) -> npt.NDArray[np.uint8]:
        """The photo as uint8 [H, W, 3], with the sensor's noise."""
        noise = random.normal(0, 3, self.photo.shape)
        return np.clip(self.photo + noise, 0, 255).round().astype(np.uint8)


@dataclass(frozen=True)
class Stage:
    """Where things stand in a scene."""

    horizon: int
    """Row where the ground begins."""
    haze: Colour
    """What distant things fade to."""
    light: float
    """Overall brightness, about 1."""


def coverage_of(drawing: Image.Image) -> Floats:
    """A drawing in mode L, FINE times too fine, as coverage float32 [h, w] in 0..1."""
    return np.asarray(drawing.reduce(FINE), np.float32) / np.float32(255)


def texture(
    random: np.random.Generator, height: int, width: int, cells: int, octaves: int
) -> Floats:
    """Smooth noise float32 [height, width] in -1..1: `cells` bumps across, then finer, weaker."""
    total = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        across = min(cells * 2**octave, width)
        down = max(2, min(height, round(across * height / width)))
        grid = Image.fromarray(random.normal(0, 0.5, (down, across)).astype(np.float32))
        smooth = grid.resize((width, height), Image.Resampling.BICUBIC)
        total += np.asarray(smooth) * 0.6**octave
    return np.clip(total, -1, 1)


_SKIES: tuple[tuple[Colour, Colour], ...] = (
    ((105, 160, 220), (205, 225, 240)),
    ((150, 165, 180), (215, 218, 220)),
    ((120, 140, 190), (245, 205, 170)),
)
_GROUNDS: tuple[tuple[Colour, Colour], ...] = (
    ((96, 140, 62), (140, 170, 92)),
    ((172, 152, 88), (196, 180, 120)),
    ((120, 122, 66), (160, 146, 96)),
    ((214, 218, 224), (232, 236, 240)),
)


def paint_land(canvas: Canvas, random: np.random.Generator) -> Stage:
    """Sky with clouds, two ranges of hills, and ground from the horizon down."""
    height, width = canvas.labels.shape
    light = float(random.uniform(0.82, 1.08))
    horizon = round(height * random.uniform(0.24, 0.36))
    above, below = (np.array(c) * light for c in _SKIES[random.integers(len(_SKIES))])
    share = np.linspace(0, 1, height, dtype=np.float32)[:, None, None] * height / max(horizon, 1)
    share = np.minimum(share, 1)
    canvas.photo[:] = above * (1 - share) + below * share
    clouds = np.clip(texture(random, height, width, 4, 4) - 0.1, 0, 1)[..., None]
    canvas.photo += (245 * light - canvas.photo) * clouds * 0.7
    near, far = (np.array(c) * light for c in _GROUNDS[random.integers(len(_GROUNDS))])
    haze = tuple(float(v) for v in below * 0.6 + far * 0.4)
    rows = np.arange(height)[:, None]
    for step, lift in enumerate((0.16, 0.08)):
        rise = texture(random, 4, width, 3 + 3 * step, 3)[0] * 0.5 + 0.5
        ridge = horizon - height * lift * rise
        colour = np.array(haze) * (0.75 - 0.1 * step) + near * (0.1 + 0.1 * step)
        canvas.photo[rows >= ridge] = colour
    depth = np.clip((rows - horizon) / max(height - horizon, 1), 0, 1).astype(np.float32)[..., None]
    ground = far * (1 - depth) + near * depth
    # Bumps are broad and flat: the ground is seen at a low angle, and coarser nearby.
    bumps = texture(random, height * 3, width, 10, 4)[::3, :, None] * (0.4 + 0.6 * depth)
    blades = random.normal(0, 1, (height, width, 1)) * depth
    ground = ground * (1 + 0.16 * bumps + 0.05 * blades)
    canvas.photo[:] = np.where(rows[..., None] >= horizon, ground, canvas.photo)
    return Stage(horizon, (haze[0], haze[1], haze[2]), light)


def paint_water(canvas: Canvas, random: np.random.Generator, stage: Stage) -> int:
    """A stretch of water from edge to edge, with an uneven shore; returns its nearest row."""
    height, width = canvas.labels.shape
    room = height - stage.horizon
    top = stage.horizon + round(room * random.uniform(0.06, 0.2))
    bottom = top + round(room * random.uniform(0.26, 0.44))
    drawing = Image.new("L", (width * FINE, height * FINE))
    xs = np.arange(0, width * FINE + FINE, FINE)
    wobble = texture(random, 4, len(xs), 5, 3)
    upper = (top + wobble[0] * room * 0.03) * FINE
    lower = (bottom + wobble[3] * room * 0.08) * FINE
    outline = [*zip(xs, upper, strict=True), *zip(xs[::-1], lower[::-1], strict=True)]
    ImageDraw.Draw(drawing).polygon([(float(x), float(y)) for x, y in outline], fill=255)
    base = np.array(stage.haze, np.float32) * 0.35 + np.array((52, 96, 124)) * stage.light * 0.65
    ripples = texture(random, height * 6, width, 8, 4)[::6, :, None]
    glint = np.clip(ripples, 0, 1) ** 2 * 60
    colours = base * (1 + 0.12 * ripples) + glint
    canvas.paint(0, 0, colours.astype(np.float32), coverage_of(drawing), WATER)
    return bottom


def paint_fence(canvas: Canvas, random: np.random.Generator, stage: Stage, foot: int) -> None:
    """Posts and rails from edge to edge, standing at row `foot`."""
    height, width = canvas.labels.shape
    room = height - stage.horizon
    tall = room * random.uniform(0.24, 0.32)
    slope = random.uniform(-0.06, 0.06)
    drawing = Image.new("L", (width * FINE, height * FINE))
    draw = ImageDraw.Draw(drawing)
    post, rail = max(1.6, height * 0.02), max(1.2, height * 0.013)
    gap = width / random.uniform(5.5, 8.5)
    for share in random.permutation((0.9, 0.58, 0.26))[: random.integers(2, 4)]:
        ends = [(x, foot + slope * (x - width / 2) - tall * share) for x in (0.0, float(width))]
        fine = [(x * FINE, y * FINE) for x, y in ends]
        draw.line(fine, fill=255, width=max(1, round(rail * FINE)))
    x = random.uniform(0, gap)
    while x < width:
        y = foot + slope * (x - width / 2) + random.uniform(-0.5, 0.5)
        corners = ((x - post / 2) * FINE, (y - tall) * FINE, (x + post / 2) * FINE, y * FINE)
        draw.rectangle(corners, fill=255)
        x += gap
    wood = (
        np.array(((128, 98, 70), (206, 200, 190), (92, 78, 64))[random.integers(3)]) * stage.light
    )
    grain = texture(random, height, width, 40, 2)[..., None]
    colours = (wood * (1 + 0.2 * grain)).astype(np.float32)
    canvas.paint(0, 0, colours, coverage_of(drawing), FENCE)
