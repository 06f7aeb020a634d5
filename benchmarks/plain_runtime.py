"""What the peers are made of: Pillow, a runtime as its own documentation opens it, and Pillow.

    python benchmarks/plain_runtime.py deploy/night/model.onnx photos/*.jpg

Run as a program it is the raw runtime: photos are decoded and fitted once, and for each line
`SECONDS` or `pass` (over all photos, once) on stdin it answers with images per second of sessions
with one thread, one for each core, and of one session with all cores, batch 1, as a line of JSON.
"""

import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

from srdeploy.artifacts.artifact import open_artifact
from srdeploy.environment import usable_cores
from srdeploy.imaging import Pixels, colour_table, fit
from srdeploy.spec import Spec

Run = Callable[[Pixels], Pixels]
"""Images uint8 [N, H, W, 3] -> labels uint8 [N, H, W]."""
HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


def open_sessions(
    file: Path, count: int, threads: int, runtime: str = "onnxruntime", precision: str = "fp32"
) -> list[Run]:
    """`count` sessions of one ONNX file, with `threads` threads each, that may run at once."""
    if runtime == "openvino":
        return _openvino_sessions(file, count, threads, precision)
    import onnxruntime

    sessions = []
    for _ in range(count):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"]
        )
        sessions.append(_OnnxRun(session))
    return list(sessions)


class _OnnxRun:
    """A session of onnxruntime."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._name = session.get_inputs()[0].name

    def __call__(self, images: Pixels) -> Pixels:
        labels: Pixels = self._session.run(None, {self._name: images})[0]
        return labels


class _OpenVINORun:
    """A request of an OpenVINO network."""

    def __init__(self, request: Any) -> None:
        self._request = request

    def __call__(self, images: Pixels) -> Pixels:
        self._request.infer({0: images}, share_inputs=True)
        return np.array(self._request.get_output_tensor(0).data)


def _openvino_sessions(file: Path, count: int, threads: int, precision: str) -> list[Run]:
    # One network with streams: two networks with a thread each would share one core.
    import openvino

    # Two threads that ask for this the first time at once wait for each other for ever.
    openvino.Type.u8.to_dtype()
    settings = {
        "NUM_STREAMS": count,
        "INFERENCE_NUM_THREADS": count * threads,
        "INFERENCE_PRECISION_HINT": HINTS[precision],
        "ENABLE_CPU_PINNING": False,
    }
    compiled = openvino.Core().compile_model(str(file), "CPU", settings)
    return [_OpenVINORun(compiled.create_infer_request()) for _ in range(count)]


def spec_of(file: Path) -> Spec:
    """What stands in the ONNX file. Ends the benchmark where it is none of ours."""
    spec = open_artifact(file).spec
    if spec is None:
        raise SystemExit(f"{file} has no srdeploy metadata: nothing was measured")
    return spec


def decode(body: bytes) -> Pixels:
    """A photo's file as RGB uint8 [H, W, 3]."""
    return np.asarray(Image.open(io.BytesIO(body)).convert("RGB"))


class MaskWriter:
    """Labels uint8 [H, W] to palette PNGs, with the colours that stand in the ONNX file."""

    def __init__(self, file: Path) -> None:
        self._palette = colour_table(spec_of(file)).tobytes()

    def __call__(self, labels: Pixels) -> bytes:
        image = Image.fromarray(labels)
        image.putpalette(self._palette)
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()


def rate(sessions: Sequence[Run], photos: Sequence[Pixels], seconds: float) -> float:
    """Images per second of all sessions together, each in a thread of its own, batch 1."""
    until = time.perf_counter() + seconds
    with ThreadPoolExecutor(len(sessions)) as pool:
        found = pool.map(_rate_of_one, sessions, [photos] * len(sessions), [until] * len(sessions))
        return sum(found)


def _rate_of_one(run: Run, photos: Sequence[Pixels], until: float) -> float:
    began = time.perf_counter()
    count = 0
    while time.perf_counter() < until:
        run(photos[count % len(photos)][None])
        count += 1
    return count / (time.perf_counter() - began)


def rate_of_pass(sessions: Sequence[Run], photos: Sequence[Pixels]) -> float:
    """Images per second of all sessions together, which go through the photos once, batch 1."""
    left = iter(photos)  # its next() is one step of the interpreter, so that threads may share it
    began = time.perf_counter()
    with ThreadPoolExecutor(len(sessions)) as pool:
        list(pool.map(_run_what_is_left, sessions, repeat(left)))
    return len(photos) / (time.perf_counter() - began)


def _run_what_is_left(run: Run, left: Iterator[Pixels]) -> None:
    for photo in left:
        run(photo[None])


def main(
    file: Annotated[Path, typer.Argument(help="The ONNX file.")],
    photos: Annotated[list[Path], typer.Argument(help="Photos, of any sizes.")],
    runtime: Annotated[str, typer.Option(help="onnxruntime or openvino.")] = "onnxruntime",
    precision: Annotated[str, typer.Option(help="Of OpenVINO: fp32, bf16, fp16.")] = "fp32",
) -> None:
    """Answer lines with raw rates, until stdin ends."""
    spec = spec_of(file)
    images = [fit(decode(photo.read_bytes()), spec) for photo in photos]
    cores = usable_cores()
    kinds = {
        f"{cores} sessions of 1 thread": open_sessions(file, cores, 1, runtime, precision),
        f"1 session of {cores} threads": open_sessions(file, 1, cores, runtime, precision),
    }
    for sessions in kinds.values():
        rate(sessions, images, 0.2)
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "pass":
            rates = {kind: rate_of_pass(sessions, images) for kind, sessions in kinds.items()}
        else:
            rates = {kind: rate(sessions, images, float(line)) for kind, sessions in kinds.items()}
        print(json.dumps(rates), flush=True)


if __name__ == "__main__":
    typer.run(main)
