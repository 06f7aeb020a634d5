"""Requests to segment photos, and whether what came back was right."""

import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from load import Call, Reply
from PIL import Image
from same_labels import compare_labels

from srdeploy.imaging import Pixels, encode_mask, fit, read_photo
from srdeploy.runtimes.registry import open_runtime

MODEL = "segmenter"
"""The name under which `srdeploy serve` is told to serve the artifact."""


@dataclass
class Verdict:
    """How many replies of status 200 were right."""

    same_bytes: int = 0
    """The PNG that `srdeploy predict` writes; of tensors, the labels themselves."""
    same_labels: int = 0
    """Another PNG of the same labels."""
    rounded: int = 0
    """Labels that differ in no more than same_labels.ROUNDING of the pixels."""
    wrong: int = 0
    refused: Counter[int] = field(default_factory=Counter)
    """Replies of other statuses, by status."""
    without_retry_after: int = 0
    """Refusals with 429 or 503 that don't say when to come back."""

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON's types."""
        return {
            "same_bytes": self.same_bytes,
            "same_labels": self.same_labels,
            "rounded": self.rounded,
            "wrong": self.wrong,
            "other_statuses": {str(status): count for status, count in self.refused.items()},
            "without_retry_after": self.without_retry_after,
        }


class Photos:
    """Photos as files, and the labels that the runtime gives for each by itself."""

    def __init__(
        self, artifact: Path, files: Sequence[Path], runtime: str, precision: str | None
    ) -> None:
        """Ends the benchmark where the photos are not of one size that the network takes as it is:
        the peers know no other."""
        self.files = list(files)
        self.labels: list[Pixels] = []
        self._bodies = [file.read_bytes() for file in files]
        self._pixels = [read_photo(file) for file in files]
        if len({one.shape for one in self._pixels}) != 1:
            raise SystemExit("photos of several sizes: nothing was measured")
        self.size = self._pixels[0].shape[:2]
        with open_runtime(artifact, runtime=runtime, precision=precision) as opened:
            for photo in self._pixels:
                if fit(photo, opened.spec).shape != photo.shape:
                    raise SystemExit(
                        f"the network takes photos at another size than {self.size[1]}x"
                        f"{self.size[0]}, and the peers don't resize: nothing was measured"
                    )
                self.labels.append(opened.run(photo[None])[0])
            self.masks = [encode_mask(one, opened.spec) for one in self.labels]
        self._judged: dict[tuple[int, bytes], str] = {}

    def image_calls(self, port: int) -> list[Call]:
        """JPEG in, PNG out."""
        calls = []
        for item, body in enumerate(self._bodies):
            head = (
                f"POST /v1/segment HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
                "Content-Type: image/jpeg\r\nAccept: image/png\r\n"
                f"Content-Length: {len(body)}\r\n\r\n"
            )
            calls.append(Call(head.encode() + body, item))
        return calls

    def tensor_calls(self, port: int) -> list[Call]:
        """KServe v2: uint8 [1, H, W, 3] in, uint8 [1, H, W] out, both as binary tensors."""
        calls = []
        for item, pixels in enumerate(self._pixels):
            described = {
                "inputs": [
                    {
                        "name": "images",
                        "shape": [1, *pixels.shape],
                        "datatype": "UINT8",
                        "parameters": {"binary_data_size": pixels.nbytes},
                    }
                ],
                "outputs": [{"name": "labels", "parameters": {"binary_data": True}}],
            }
            text = json.dumps(described).encode()
            head = (
                f"POST /v2/models/{MODEL}/infer HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
                "Content-Type: application/octet-stream\r\n"
                f"Inference-Header-Content-Length: {len(text)}\r\n"
                f"Content-Length: {len(text) + pixels.nbytes}\r\n\r\n"
            )
            calls.append(Call(head.encode() + text + pixels.tobytes(), item))
        return calls

    def judge(self, replies: Counter[Reply]) -> Verdict:
        """Looks at every reply; equal ones are looked at once."""
        verdict = Verdict()
        for reply, count in replies.items():
            if reply.status != 200:
                verdict.refused[reply.status] += count
                if reply.status in (429, 503) and not reply.retry_after:
                    verdict.without_retry_after += count
                continue
            kind = self._kind(reply)
            setattr(verdict, kind, getattr(verdict, kind) + count)
        return verdict

    def _kind(self, reply: Reply) -> str:
        body = reply.body[reply.inference_header_length :]
        key = (reply.item, body)
        if key not in self._judged:
            self._judged[key] = self._compare(reply.item, body, reply.inference_header_length > 0)
        return self._judged[key]

    def _compare(self, item: int, body: bytes, tensor: bool) -> str:
        wanted = self.labels[item]
        if body == (wanted.tobytes() if tensor else self.masks[item]):
            return "same_bytes"
        try:
            if tensor:
                labels = np.frombuffer(body, np.uint8).reshape(wanted.shape)
            else:
                labels = np.asarray(Image.open(io.BytesIO(body)))
        except (OSError, ValueError):
            return "wrong"
        found = compare_labels(labels, wanted)
        return "same_labels" if found == "same" else found
