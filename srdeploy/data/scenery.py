"""The stage of the synthetic scenes: sky, hills, ground, water and fences.

A `Canvas` holds photo and labels side by side; everything is painted on it through a coverage map,
so that the mask is exactly what was painted. H height, W width of the canvas, in pixels.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

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
        ring = (_dilated(inside) & ~inside)[rows, columns]
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
    """The positions of things in a scene."""

    horizon: int
    """Row where the ground begins."""
    haze: Colour
    """The colour that distant things fade to."""
    light: float
    """Overall brightness, about 1."""


def _dilated(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """A mask bool [h, w], grown by one pixel to all eight sides."""
    padded = np.pad(mask, 1)
    tall = padded[:-2] | padded[1:-1] | padded[2:]
    return tall[:, :-2] | tall[:, 1:-1] | tall[:, 2:]


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


# Animals: bodies of ellipses and polygons on thin legs

Point = tuple[float, float]


@dataclass(frozen=True)
class Figure:
    """The build of a kind of animal."""

    body: tuple[float, float, float]
    """Half length, half height and the row of the body's centre."""
    leg: float
    """Width of a leg."""
    neck: float
    """Width of the neck."""
    head: Point
    """Where the head is when it is up."""
    head_size: Point
    """Half length and half height of the head."""
    grazing: Point
    """Where the head is when it is down."""
    coats: tuple[tuple[Colour, Colour], ...]
    """Colours of body and markings, one pair per coat."""
    legs: int = 4
    horns: float = 0.0
    """Length of horns or antlers."""
    woolly: bool = False
    patches: int = 0
    """Markings on the body."""


_CATTLE = Figure(
    body=(0.52, 0.25, 0.38),
    leg=0.075,
    neck=0.24,
    head=(0.72, 0.17),
    head_size=(0.16, 0.1),
    grazing=(0.78, 0.78),
    coats=(
        ((104, 62, 40), (232, 224, 212)),
        ((58, 48, 46), (226, 222, 216)),
        ((150, 96, 58), (236, 226, 208)),
    ),
    horns=0.1,
    patches=5,
)

FIGURES: dict[str, Figure] = {
    "cow": _CATTLE,
    "buffalo": _CATTLE,
    "deer": Figure(
        body=(0.33, 0.14, 0.47),
        leg=0.04,
        neck=0.11,
        head=(0.47, 0.12),
        head_size=(0.11, 0.06),
        grazing=(0.55, 0.85),
        coats=(((150, 104, 62), (226, 204, 172)), ((124, 92, 66), (214, 196, 172))),
        horns=0.2,
    ),
    "sheep": Figure(
        body=(0.47, 0.3, 0.38),
        leg=0.07,
        neck=0.24,
        head=(0.58, 0.3),
        head_size=(0.14, 0.1),
        grazing=(0.62, 0.74),
        coats=(((226, 220, 204), (64, 58, 56)), ((204, 196, 182), (196, 186, 172))),
        woolly=True,
    ),
    "heron": Figure(
        body=(0.25, 0.12, 0.48),
        leg=0.028,
        neck=0.05,
        head=(0.3, 0.08),
        head_size=(0.08, 0.04),
        grazing=(0.48, 0.56),
        coats=(((128, 140, 156), (232, 234, 236)), ((230, 232, 234), (206, 212, 218))),
        legs=2,
    ),
}
"""The figures by class name."""

_ACROSS = 2.3
"""Width of the drawing in animal heights."""
_MARGIN = 3
"""Pixels below the feet, where their outline and its ring of void need room."""
_UP = 1.25
"""Height of the drawing in animal heights: antlers and backs rise above 1."""


def paint_animal(
    canvas: Canvas,
    random: np.random.Generator,
    stage: Stage,
    name: str,
    label: int,
    feet: Point,
    height: float,
    haze: float,
) -> None:
    """Paints an animal `height` pixels tall whose feet stand at `feet` (row, column).

    `haze` in 0..1 is how far it fades into the distance.
    """
    figure = FIGURES[name]
    rows, columns = round(height * _UP) + _MARGIN, round(height * _ACROSS) + _MARGIN
    pen = _Pen(rows, columns, height)
    coat = figure.coats[random.integers(len(figure.coats))]
    tone = random.uniform(0.9, 1.1)
    body = (coat[0][0] * tone, coat[0][1] * tone, coat[0][2] * tone)
    head = figure.grazing if random.random() < 0.4 else figure.head
    _draw_legs(pen, figure, random, body)
    _draw_trunk(pen, figure, random, body, coat[1])
    _draw_head(pen, figure, head, body, coat[1])
    colours, coverage = pen.finished()
    # Lit from above, darker below; the coat's texture; then the distance.
    light = np.linspace(1.16, 0.72, rows, dtype=np.float32)[:, None, None] * stage.light
    hair = 1 + (0.16 if figure.woolly else 0.09) * texture(random, rows, columns, 9, 3)[..., None]
    colours = colours * light * hair
    colours = colours * (1 - haze) + np.array(stage.haze, np.float32) * haze
    if random.random() < 0.5:
        colours, coverage = colours[:, ::-1], coverage[:, ::-1]
    canvas.shade(feet, (height * 0.07, height * figure.body[0] * 1.2), 0.4 * (1 - haze))
    top, left = round(feet[0]) - rows + _MARGIN, round(feet[1] - columns / 2)
    canvas.paint(top, left, colours.astype(np.float32), coverage, label)


class _Pen:
    """Draws colours and coverage of one animal, FINE times finer than the canvas."""

    def __init__(self, rows: int, columns: int, height: float) -> None:
        self.scale = height * FINE
        self.origin = columns * FINE / 2, (rows - _MARGIN) * FINE - height * FINE
        self.colours = Image.new("RGB", (columns * FINE, rows * FINE), (90, 80, 70))
        self.coverage = Image.new("L", self.colours.size)
        self._draws = ImageDraw.Draw(self.colours), ImageDraw.Draw(self.coverage)

    def ellipse(self, centre: Point, radii: Point, colour: Colour, inside: bool = False) -> None:
        """An ellipse; with `inside` it colours only what is covered already."""
        (x, y), (across, up) = self._at(centre), (radii[0] * self.scale, radii[1] * self.scale)
        box = (x - across, y - up, x + across, y + up)
        self._draws[0].ellipse(box, fill=_ink(colour))
        if not inside:
            self._draws[1].ellipse(box, fill=255)

    def line(self, points: list[Point], width: float, colour: Colour) -> None:
        """A bent line, at least 1.3 pixels of the canvas wide so that it does not vanish."""
        fine = max(round(width * self.scale), round(1.3 * FINE))
        path = [self._at(point) for point in points]
        self._draws[0].line(path, fill=_ink(colour), width=fine, joint="curve")
        self._draws[1].line(path, fill=255, width=fine, joint="curve")

    def polygon(self, points: list[Point], colour: Colour) -> None:
        """A filled outline."""
        path = [self._at(point) for point in points]
        self._draws[0].polygon(path, fill=_ink(colour))
        self._draws[1].polygon(path, fill=255)

    def finished(self) -> tuple[Floats, Floats]:
        """Colours float32 [rows, columns, 3] and coverage float32 [rows, columns]."""
        return np.asarray(self.colours.reduce(FINE), np.float32), coverage_of(self.coverage)

    def _at(self, point: Point) -> Point:
        return self.origin[0] + point[0] * self.scale, self.origin[1] + point[1] * self.scale


def _draw_legs(pen: _Pen, figure: Figure, random: np.random.Generator, coat: Colour) -> None:
    """Far legs first and darker; each bends at the knee."""
    half, _, centre = figure.body
    if figure.legs == 2:
        places = [(-0.04, 0.6), (0.06, 0.9)]
    else:
        places = [(-0.62, 0.6), (0.62, 0.6), (-0.8, 0.95), (0.78, 0.95)]
    for place, shade in places:
        hip = place * half
        swing = random.uniform(-0.09, 0.09)
        knee = (hip + swing * 0.3, centre + (1 - centre) * 0.55)
        colour = (coat[0] * shade, coat[1] * shade, coat[2] * shade)
        if figure.woolly or figure.legs == 2:
            colour = (66 * shade, 58 * shade, 52 * shade)
        pen.line([(hip, centre), knee, (hip + swing, 1.0)], figure.leg, colour)


def _draw_trunk(
    pen: _Pen, figure: Figure, random: np.random.Generator, coat: Colour, marking: Colour
) -> None:
    """Body, markings and tail."""
    half, up, centre = figure.body
    if figure.woolly:
        for angle in np.linspace(0, 2 * np.pi, 11, endpoint=False):
            puff = (half * 0.74 * float(np.cos(angle)), centre + up * 0.62 * float(np.sin(angle)))
            pen.ellipse(puff, (up * 0.45, up * 0.42), coat)
    pen.ellipse((0, centre), (half * 0.9, up * 0.92), coat)
    if figure.legs == 4 and not figure.woolly:
        # Shoulder and haunch make the outline an animal's, not a barrel's.
        pen.ellipse((half * 0.58, centre - up * 0.06), (half * 0.42, up), coat)
        pen.ellipse((-half * 0.6, centre - up * 0.02), (half * 0.4, up * 0.98), coat)
        tail = [(-half * 0.96, centre - up * 0.5), (-half * 1.12, centre + up * 0.9)]
        pen.line(tail, figure.leg * 0.5, coat)
    if figure.legs == 2:
        low = centre + up
        pen.polygon(
            [(-half * 0.5, centre - up * 0.6), (-half * 1.5, low), (-half * 0.4, low)], coat
        )
        pen.ellipse((half * 0.3, centre + up * 0.4), (half * 0.4, up * 0.4), marking, inside=True)
    for _ in range(figure.patches):
        spot = (random.uniform(-0.75, 0.7) * half, centre + random.uniform(-0.6, 0.5) * up)
        size = (random.uniform(0.08, 0.2) * half, random.uniform(0.12, 0.3) * up)
        pen.ellipse(spot, size, marking, inside=True)
        beside = (spot[0] + size[0] * 0.7, spot[1] + size[1] * random.uniform(-0.8, 0.8))
        pen.ellipse(beside, (size[0] * 0.7, size[1] * 0.8), marking, inside=True)


def _draw_head(pen: _Pen, figure: Figure, head: Point, coat: Colour, marking: Colour) -> None:
    """Neck, head, ears, and horns, antlers or a bill."""
    half, up, centre = figure.body
    x, y = head
    long, high = figure.head_size
    if figure.legs == 2:
        bend = ((half + x) * 0.62, (centre + y) * 0.46)
        pen.line([(half * 0.6, centre - up * 0.3), bend, (x - long * 0.4, y)], figure.neck, coat)
        pen.ellipse((x, y), (long, high), coat)
        pen.line(
            [(x + long * 0.6, y), (x + long * 2.6, y + high * 0.6)], figure.leg, (196, 160, 70)
        )
        return
    wide = figure.neck / 2
    pen.polygon(
        [
            (half * 0.35, centre - up * 0.95),
            (x - long * 0.5, y - high),
            (x + long * 0.1, y + high),
            (half * 0.85, centre + wide),
        ],
        coat,
    )
    face = marking if figure.woolly else coat
    pen.ellipse((x, y), (long, high), face)
    pen.ellipse((x + long * 0.75, y + high * 0.3), (long * 0.36, high * 0.55), marking)
    ear = figure.leg * 0.55
    pen.line([(x - long * 0.5, y - high * 0.4), (x - long * 1.1, y - high * 0.9)], ear, face)
    if figure.horns:
        root, bend = (x - long * 0.3, y - high * 0.7), (x + long * 0.3, y - high * 1.5)
        pen.line([root, bend, (x - long * 0.1, y - high - figure.horns)], ear, (214, 202, 178))


def _ink(colour: Colour) -> tuple[int, int, int]:
    red, green, blue = (max(0, min(255, round(value))) for value in colour)
    return red, green, blue
