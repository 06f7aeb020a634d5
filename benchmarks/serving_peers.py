"""Servers to compare with: plain FastAPI applications around the same ONNX file.

    python benchmarks/serving_peers.py model.onnx --port 8001 --sessions 2 --threads 1 --pool 4

POST /v1/segment takes a JPEG and answers with a palette PNG; GET /health answers once the network
has run. LitServe's is litserve_peer.py.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated

import numpy as np
import typer
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from plain_runtime import MaskWriter, Run, decode, open_sessions


class Segmenter:
    """JPEG in, PNG out, on the calling thread, with whichever session is free."""

    def __init__(
        self, file: Path, sessions: int, threads: int, runtime: str, precision: str
    ) -> None:
        self._write = MaskWriter(file)
        opened = open_sessions(file, sessions, threads, runtime, precision)
        for run in opened:
            run(np.zeros((1, 360, 480, 3), np.uint8))
        self._only = opened[0] if sessions == 1 else None
        self._free: SimpleQueue[Run] = SimpleQueue()
        for run in opened:
            self._free.put(run)
        # A request of OpenVINO takes one image at a time; onnxruntime's session takes many.
        self._shared = runtime == "onnxruntime"

    def __call__(self, body: bytes) -> bytes:
        images = decode(body)[None]
        if self._only is not None and self._shared:
            return self._write(self._only(images)[0])
        run = self._free.get()
        try:
            labels = run(images)
        finally:
            self._free.put(run)
        return self._write(labels[0])


def make_app(segmenter: Segmenter, pool: int) -> FastAPI:
    """pool: threads that serve requests; 0: FastAPI's own, of which there are 40."""
    executor = ThreadPoolExecutor(pool) if pool else None
    app = FastAPI()

    @app.get("/health")
    def health() -> str:
        return "ok"

    @app.post("/v1/segment")
    async def segment(request: Request) -> Response:
        body = await request.body()
        if executor is None:
            mask = await run_in_threadpool(segmenter, body)
        else:
            mask = await asyncio.get_running_loop().run_in_executor(executor, segmenter, body)
        return Response(mask, media_type="image/png")

    return app


def main(
    file: Annotated[Path, typer.Argument(help="The ONNX file.")],
    port: Annotated[int, typer.Option(help="Of 127.0.0.1.")],
    sessions: Annotated[int, typer.Option(help="Sessions that may run at once.")] = 2,
    threads: Annotated[int, typer.Option(help="Of each session.")] = 1,
    pool: Annotated[int, typer.Option(help="Threads for requests; 0: FastAPI's own 40.")] = 4,
    runtime: Annotated[str, typer.Option(help="onnxruntime or openvino.")] = "onnxruntime",
    precision: Annotated[str, typer.Option(help="Of OpenVINO: fp32, bf16, fp16.")] = "fp32",
) -> None:
    """Serve until a signal ends it."""
    segmenter = Segmenter(file, sessions, threads, runtime, precision)
    app = make_app(segmenter, pool)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    typer.run(main)
