"""Class tables: names, colours, the ignored label, and which classes count."""

import difflib
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from srdeploy.errors import UserError
from srdeploy.files import read_json
from srdeploy.spec import Byte, Colour, check_classes
from srdeploy.validation import Settings, validated

CLASSES_FILE = "classes.json"


class ClassTable(Settings):
    """The classes of a data set. A mask's pixel value is the position of its class in `names`."""

    names: tuple[str, ...] = Field(min_length=2, max_length=255)
    """Class names; the position is the id."""
    palette: tuple[Colour, ...]
    """One RGB colour per class, 0..255."""
    ignore_index: Byte = 255
    """Label of pixels that are neither trained on nor scored."""
    void_colour: Colour = (224, 224, 192)
    """RGB colour of ignored pixels in pictures."""
    scored: tuple[int, ...] | None = None
    """Ids that are trained on and scored; other classes are read as `ignore_index`. None: all."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_classes(self.names, self.palette, self.ignore_index, self.scored)
        return self


def colour_map(count: int) -> tuple[tuple[int, int, int], ...]:
    """`count` distinct RGB colours: PASCAL VOC's map, an id's bits dealt out over the channels."""
    colours = []
    for index in range(count):
        red = green = blue = 0
        for bit in range(8):
            part = index >> (3 * bit)
            red |= (part & 1) << (7 - bit)
            green |= (part >> 1 & 1) << (7 - bit)
            blue |= (part >> 2 & 1) << (7 - bit)
        colours.append((red, green, blue))
    return tuple(colours)


def read_class_table(path: Path) -> ClassTable:
    """Reads classes.json: `names`, and where wanted the other fields of ClassTable.

    `eval_class_ids` is another name for `scored`. Without a palette, VOC's colours are used. Keys
    that srdeploy does not know are taken as notes, unless they look like a misspelt one.
    Raises UserError that names the file and the first fault.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: a JSON object with 'names' is needed, this is {type(content).__name__}"
        )
    _refuse_misspelt(content, path)
    if "scored" in content and "eval_class_ids" in content:
        raise UserError(f"{path}: 'scored' and 'eval_class_ids' mean the same, keep one")
    values: dict[str, Any] = {k: v for k, v in content.items() if k in ClassTable.model_fields}
    if "eval_class_ids" in content:
        values["scored"] = content["eval_class_ids"]
    if "palette" not in values and isinstance(values.get("names"), list):
        values["palette"] = colour_map(len(values["names"]))
    return validated(ClassTable, values, str(path))


def _refuse_misspelt(content: dict[str, Any], path: Path) -> None:
    known = [*ClassTable.model_fields, "eval_class_ids"]
    for key in content:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
        # "eval_class_names" reads well beside "eval_class_ids" and is a note, not a slip.
        if key not in known and near and near[0] not in content:
            raise UserError(f"{path}: unknown key '{key}': did you mean '{near[0]}'?")


VOC = ClassTable(
    names=(
        "background",
        "aeroplane",
        "bicycle",
        "bird",
        "boat",
        "bottle",
        "bus",
        "car",
        "cat",
        "chair",
        "cow",
        "diningtable",
        "dog",
        "horse",
        "motorbike",
        "person",
        "pottedplant",
        "sheep",
        "sofa",
        "train",
        "tvmonitor",
    ),
    palette=colour_map(21),
)
"""PASCAL VOC 2012's 21 classes (Everingham et al., IJCV 2010)."""

_CITYSCAPES: dict[str, tuple[int, tuple[int, int, int]]] = {
    "road": (7, (128, 64, 128)),
    "sidewalk": (8, (244, 35, 232)),
    "building": (11, (70, 70, 70)),
    "wall": (12, (102, 102, 156)),
    "fence": (13, (190, 153, 153)),
    "pole": (17, (153, 153, 153)),
    "traffic light": (19, (250, 170, 30)),
    "traffic sign": (20, (220, 220, 0)),
    "vegetation": (21, (107, 142, 35)),
    "terrain": (22, (152, 251, 152)),
    "sky": (23, (70, 130, 180)),
    "person": (24, (220, 20, 60)),
    "rider": (25, (255, 0, 0)),
    "car": (26, (0, 0, 142)),
    "truck": (27, (0, 0, 70)),
    "bus": (28, (0, 60, 100)),
    "train": (31, (0, 80, 100)),
    "motorcycle": (32, (0, 0, 230)),
    "bicycle": (33, (119, 11, 32)),
}

CITYSCAPES = ClassTable(
    names=tuple(_CITYSCAPES),
    palette=tuple(colour for _, colour in _CITYSCAPES.values()),
    void_colour=(0, 0, 0),
)
"""The 19 classes that Cityscapes evaluates (Cordts et al., CVPR 2016), by training id."""

CITYSCAPES_LABEL_IDS: tuple[int, ...] = tuple(ident for ident, _ in _CITYSCAPES.values())
"""The id in *_labelIds.png of each of the 19 classes."""

CITYSCAPES_HIGHEST_LABEL_ID = 33
"""Ids 0..33 exist (license plates are -1, stored as 255); those outside the 19 are ignored."""
