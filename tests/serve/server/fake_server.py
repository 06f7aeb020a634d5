"""A fake server for the page, which answers with known labels as the real server does."""

import io
import json
import threading
from http.server import BaseHTTPRequestHandler
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import numpy as np
from PIL import Image, ImageOps

from srdeploy.imaging import Pixels
from srdeploy.serve.server.page import render_page

WIDTH, HEIGHT = 160, 120
HOSTILE = "<img src=x onerror=document.title='taken'>"
MODELS = {
    "plain": [("sky", (40, 90, 220)), ("road", (200, 40, 60)), (HOSTILE, (20, 160, 80))],
    "small <b>": [("road", (200, 40, 60)), ("sky", (40, 90, 220))],
}


def labels_of(model: str, height: int, width: int) -> Pixels:
    """Sky on the left and road on the right, with the border at a half or at six tenths.

    The plain model adds the third class in the upper right corner. Both ignore the lowest rows, it
    twice as many. They count their classes in different orders.
    """
    labels = np.zeros((height, width), np.uint8)
    if model == "plain":
        labels[:, width // 2 :] = 1
        labels[: height // 4, 7 * width // 10 :] = 2
        labels[height - height // 10 :] = 255
    else:
        labels[:, : 6 * width // 10] = 1
        labels[height - height // 20 :] = 255
    return labels


def names_at(model: str, labels: Pixels) -> Any:
    """Class names instead of ids."""
    table = np.array([name for name, _ in MODELS[model]] + [""] * 254, dtype=object)
    return table[labels]


def run_lengths(inside: Any) -> list[int]:
    """COCO's run lengths, column-major and zeros first, counted pixel by pixel."""
    counts, current = [0], False
    for value in inside.T.ravel().tolist():
        if value != current:
            counts.append(0)
            current = value
        counts[-1] += 1
    return counts


def photo_bytes(width: int = WIDTH, height: int = HEIGHT, orientation: int = 1) -> bytes:
    """A uniformly gray PNG; with an orientation, a JPEG that viewers rotate."""
    buffer = io.BytesIO()
    image = Image.new("RGB", (width, height), (100, 100, 100))
    if orientation == 1:
        image.save(buffer, "PNG")
    else:
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


class FakeServer(BaseHTTPRequestHandler):
    """Answers as the server does; class attributes set its behaviour."""

    models: ClassVar[list[str]] = [*MODELS]
    key: ClassVar[str | None] = None
    failure: ClassVar[tuple[int, str] | None] = None
    released: ClassVar[threading.Event] = threading.Event()
    asked: ClassVar[list[str]] = []
    sizes: ClassVar[list[tuple[int, int]]] = []
    """(width, height) of the received photos, upright."""

    @classmethod
    def reset(cls) -> None:
        cls.models, cls.key, cls.failure, cls.asked = [*MODELS], None, None, []
        cls.sizes = []
        cls.released.set()

    def log_message(self, format: str, *values: Any) -> None:
        pass

    def answer(self, status: int, kind: str, body: bytes, **headers: str) -> None:
        self.send_response(status)
        fields = {"Content-Type": kind, "Content-Length": str(len(body))} | headers
        for name, value in fields.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def answer_json(self, status: int, value: Any) -> None:
        self.answer(status, "application/json", json.dumps(value).encode())

    def locked(self) -> bool:
        if self.key is None or self.headers["Authorization"] == f"Bearer {self.key}":
            return False
        self.answer_json(401, {"error": "this server asks for its API key"})
        return True

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path == "/":
            page, policy = render_page()
            kind = "text/html; charset=utf-8"
            self.answer(200, kind, page.encode(), Content_Security_Policy=policy)
        elif self.locked():
            pass
        elif path == "/v1/models":
            self.answer_json(200, self.description())
        else:
            self.answer(200, "image/jpeg", photo_bytes(64, 48, orientation=6))

    def description(self) -> dict[str, Any]:
        models = [
            {
                "name": name,
                "version": "1",
                "classes": classes_of(name),
                "backend": "onnxruntime",
                "device": "cpu",
                "precision": "fp32",
                "input": {
                    "smallest": [32, 32],
                    "usual": [360, 480],
                    "largest": [720, 960],
                    "longest_side": None,
                },
                "plan": {
                    "lone": {"sessions": 1, "threads": 2},
                    "shared": {"sessions": 2, "threads": 1},
                    "batch": 8,
                    "max_wait_ms": 2.0,
                    "measured": [],
                },
            }
            for name in self.models
        ]
        samples = [{"name": "upright.jpg", "url": "/v1/samples/0"}]
        limits = {"body_mib": 1, "megapixels": 50.0}
        key = self.key is not None
        return {"models": models, "samples": samples, "limits": limits, "key_needed": key}

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append(self.path)
        self.released.wait(10)
        query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        if self.locked():
            return
        if self.failure:
            self.answer_json(self.failure[0], {"error": self.failure[1]})
            return
        with Image.open(io.BytesIO(body)) as file:
            width, height = ImageOps.exif_transpose(file).size
        self.sizes.append((width, height))
        labels = labels_of(query["model"], height, width)
        if query["output"] == "mask":
            buffer = io.BytesIO()
            Image.fromarray(labels).save(buffer, "PNG")
            self.answer(200, "image/png", buffer.getvalue())
            return
        assert (query["output"], query["regions"]) == ("json", "rle")
        self.answer_json(200, segmented(query["model"], labels))


def classes_of(model: str) -> list[dict[str, Any]]:
    """As `/v1/models` lists them."""
    return [
        {"id": index, "name": name, "colour": colour}
        for index, (name, colour) in enumerate(MODELS[model])
    ]


def segmented(model: str, labels: Pixels) -> dict[str, Any]:
    """The answer of /v1/segment."""
    classes = []
    for known in classes_of(model):
        inside = labels == known["id"]
        rle = {"size": list(labels.shape), "counts": run_lengths(inside)}
        sums = {"pixels": int(inside.sum()), "share": float(inside.mean())}
        if inside.any():
            classes.append(known | sums | {"rle": rle})
    classes.sort(key=lambda each: -each["pixels"])
    image = {
        "name": None,
        "width": labels.shape[1],
        "height": labels.shape[0],
        "classes": classes,
        "ignored_pixels": int((labels == 255).sum()),
    }
    timing = {"decode": 2.5, "wait": 0.5, "compute": 12.0, "encode": 1.0, "total": 16.0, "batch": 1}
    return {"model": model, "version": "1", "images": [image], "timing_ms": timing}
