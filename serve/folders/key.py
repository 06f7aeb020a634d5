"""What the ids and colours in an output folder mean."""

import json

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from srdeploy.imaging import Pixels, encode_png
from srdeploy.serve.folders.store import Store
from srdeploy.spec import Spec

CLASSES = "classes.json"
LEGEND = "legend.png"


def write_key(store: Store, spec: Spec) -> None:
    """Writes classes.json, which has a data set's form, so that masks can serve as labels, and
    legend.png. Raises OutputError."""
    values = spec.model_dump(
        mode="json", include={"palette", "ignore_index", "void_colour", "scored"}
    )
    table = {"names": list(spec.classes)} | values
    store.write(CLASSES, (json.dumps(table, indent=1, allow_nan=False) + "\n").encode())
    store.write(LEGEND, encode_png(draw_legend(spec)))


def draw_legend(spec: Spec) -> Pixels:
    """A picture of the class colours with ids and names, uint8 [H, W, 3]."""
    row, swatch = 24, 40
    font = ImageFont.load_default(14)
    lines = [f"{index}  {name}" for index, name in enumerate(spec.classes)]
    lines.append(f"{spec.ignore_index}  (not scored)")
    colours = [*spec.palette, spec.void_colour]
    width = swatch + 24 + int(max(font.getlength(line) for line in lines))
    picture = Image.new("RGB", (width, row * len(lines) + 8), "white")
    draw = ImageDraw.Draw(picture)
    for index, (line, colour) in enumerate(zip(lines, colours, strict=True)):
        top = 4 + index * row
        draw.rectangle((8, top + 3, swatch, top + row - 3), fill=colour, outline=(96, 96, 96))
        draw.text((swatch + 8, top + 3), line, fill="black", font=font)
    return np.array(picture)
