"""The animals of the made-up scenes: bodies of ellipses and polygons on thin legs.

Cow and buffalo are drawn by one and the same figure with the same coats: nothing in an animal's own
pixels tells them apart, only whether it stands behind a fence or beside water.
Lengths are in units of the animal's height, x to its front, y downwards, feet at y = 1.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from srdeploy.data.scenery import FINE, Canvas, Colour, Floats, Stage, coverage_of, texture

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
"""By class name."""

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
