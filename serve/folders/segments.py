"""The classes of one photo as COCO's run lengths, in JSON."""

import json
from typing import Any

from srdeploy.imaging import Pixels
from srdeploy.serve.folders.text import as_text
from srdeploy.serve.regions import LabelRuns, label_runs
from srdeploy.spec import Spec


def encode_segments(name: str, labels: Pixels, spec: Spec) -> bytes:
    """Labels uint8 [H, W] as one segment for each class that occurs, by class id.

    `counts` are COCO's uncompressed run lengths, `bbox` is [x, y, width, height] in pixels; labels
    that are no class are left out. name: of the photo.
    """
    height, width = labels.shape
    head = {"photo": as_text(name), "size": [height, width], "classes": list(spec.classes)}
    # One by one: as Python's objects, the numbers of a large photo take many times their text.
    segments = [
        _json(_segment(runs, (height, width), spec))
        for runs in label_runs(labels)
        if runs.label < spec.class_count
    ]
    return f'{_json(head)[:-1]},"segments":[{",".join(segments)}]}}\n'.encode()


def _segment(runs: LabelRuns, size: tuple[int, int], spec: Spec) -> dict[str, Any]:
    return {
        "category_id": runs.label,
        "category": spec.classes[runs.label],
        "area": runs.area,
        "bbox": runs.box,
        "segmentation": {"size": size, "counts": runs.counts},
    }


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
