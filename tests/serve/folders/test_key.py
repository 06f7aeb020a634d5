"""What lies beside the masks so that people and programs can read them."""

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from srdeploy.data.classes import read_class_table
from srdeploy.imaging import decode_photo
from srdeploy.serve.folders.rendering import draw_legend, write_key
from srdeploy.spec import Spec

SPEC = Spec(
    classes=("sky", "road", "собака"),
    palette=((1, 2, 3), (200, 0, 0), (0, 0, 200)),
    ignore_index=9,
    scored=(0, 2),
)


class Kept:
    """What was written, by path."""

    root = "kept"

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def write(self, path: str, content: bytes) -> None:
        self.files[path] = content

    def write_file(self, path: str, source: Path) -> None:
        self.files[path] = source.read_bytes()

    def size(self, path: str) -> int | None:
        return len(self.files[path]) if path in self.files else None


def test_classes_json_reads_as_a_class_table(tmp_path: Path) -> None:
    kept = Kept()
    write_key(kept, SPEC)
    assert set(kept.files) == {"classes.json", "legend.png"}
    (tmp_path / "classes.json").write_bytes(kept.files["classes.json"])
    table = read_class_table(tmp_path / "classes.json")
    assert (table.names, table.palette) == (SPEC.classes, SPEC.palette)
    assert (table.ignore_index, table.void_colour) == (SPEC.ignore_index, SPEC.void_colour)
    assert table.scored == SPEC.scored


def test_the_legend_is_a_picture_of_every_class_colour() -> None:
    kept = Kept()
    write_key(kept, SPEC)
    with Image.open(BytesIO(kept.files["legend.png"])) as image:
        assert image.format == "PNG"
    legend = decode_photo(kept.files["legend.png"], "legend.png")
    np.testing.assert_array_equal(legend, draw_legend(SPEC))
    shown = {tuple(colour) for colour in legend.reshape(-1, 3).tolist()}
    assert shown >= {*SPEC.palette, SPEC.void_colour}
