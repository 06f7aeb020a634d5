"""The classes of one photo as COCO's run lengths, in JSON."""

import json
from typing import Any

from srdeploy.imaging import Pixels
from srdeploy.serve.folders.text import as_text
from srdeploy.serve.regions import label_runs
from srdeploy.spec import Spec


def encode_segments(name: str, labels: Pixels, spec: Spec) -> bytes:
    """Labels uint8 [H, W] as one segment for each class that occurs, by class id.

    `counts` are COCO's uncompressed run lengths, `bbox` is [x, y, width, height] in pixels; labels
    that are no class are left out. name: of the photo.
    """
    height, width = labels.shape
    segments: list[dict[str, Any]] = []
    for runs in label_runs(labels):
        if runs.label >= spec.class_count:
            continue
        segments.append(
            {
                "category_id": runs.label,
                "category": spec.classes[runs.label],
                "area": runs.area,
                "bbox": list(runs.box),
                "segmentation": {"size": [height, width], "counts": runs.counts},
            }
        )
    content = {
        "photo": as_text(name),
        "size": [height, width],
        "classes": list(spec.classes),
        "segments": segments,
    }
    return (json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n").encode()
