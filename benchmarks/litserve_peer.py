"""LitServe around the same ONNX file: what serving.py starts when litserve is installed.

python benchmarks/litserve_peer.py model.onnx --port 8001 --batch 8 --wait-ms 5
"""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from fastapi import Body, Response
from plain_runtime import MaskWriter, decode, open_sessions

from srdeploy.imaging import Pixels

litserve: Any = import_module("litserve")  # its types are not ours to check, nor always there


class Segmenter(litserve.LitAPI):  # type: ignore[misc]  # a base class without types
    """JPEG in, PNG out. LitServe decodes and encodes in the worker that runs the network."""

    def __init__(self, file: Path, threads: int, runtime: str, precision: str, **options: Any):
        super().__init__(api_path="/v1/segment", **options)
        self._file, self._threads = file, threads
        self._runtime, self._precision = runtime, precision
        self._batched = options.get("max_batch_size", 1) > 1

    def setup(self, device: str) -> None:
        """Opens the network, in the worker."""
        self._write = MaskWriter(self._file)
        (self._run,) = open_sessions(self._file, 1, self._threads, self._runtime, self._precision)
        self._run(np.zeros((1, 360, 480, 3), np.uint8))

    def decode_request(self, request: Annotated[bytes, Body(media_type="image/jpeg")]) -> Pixels:
        """A photo [H, W, 3]."""
        return decode(request)

    def batch(self, inputs: Sequence[Pixels]) -> Pixels:
        """Photos of one size, [N, H, W, 3]."""
        return np.stack(inputs)

    def predict(self, x: Pixels) -> Pixels:
        """Labels [N, H, W]; of one photo [H, W]."""
        if self._batched:
            return self._run(x)
        labels: Pixels = self._run(x[None])[0]
        return labels

    def unbatch(self, output: Pixels) -> list[Pixels]:
        """Labels [H, W] of each."""
        return list(output)

    def encode_response(self, output: Pixels) -> Response:
        """A palette PNG."""
        return Response(self._write(output), media_type="image/png")


def main(
    file: Annotated[Path, typer.Argument(help="The ONNX file.")],
    port: Annotated[int, typer.Option(help="Of 127.0.0.1.")],
    batch: Annotated[int, typer.Option(help="Images of a batch.")] = 1,
    wait_ms: Annotated[float, typer.Option(help="For further images of a batch.")] = 5.0,
    threads: Annotated[int, typer.Option(help="Of the one session.")] = 2,
    runtime: Annotated[str, typer.Option(help="onnxruntime or openvino.")] = "onnxruntime",
    precision: Annotated[str, typer.Option(help="Of OpenVINO: fp32, bf16, fp16.")] = "fp32",
) -> None:
    """Serve until a signal ends it, with one worker."""
    options = {"max_batch_size": batch, "batch_timeout": wait_ms / 1000} if batch > 1 else {}
    api = Segmenter(file.resolve(), threads, runtime, precision, **options)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(
        host="127.0.0.1",
        port=port,
        log_level="warning",
        generate_client_file=False,
        access_log=False,
    )


if __name__ == "__main__":
    typer.run(main)
