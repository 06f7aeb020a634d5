"""`srdeploy predict` over a folder of photos, as often as it is told.

    python benchmarks/folder_ours.py deploy/night/model.onnx camvid/images/test

For each line `FOLDER` on stdin every photo is done into that folder, and {"images", "seconds",
"network_busy"} is answered. The seconds are the job's own: from the first photo asked for to the
last mask and its record written. Each job opens the network anew, before those seconds begin; what
a runtime leaves to its first run is in them.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from srdeploy import console
from srdeploy.serve.folders.predict import predict_photos
from srdeploy.serve.folders.settings import PredictSettings
from srdeploy.serve.scheduling.sessions import Source


def main(
    graph: Annotated[Path, typer.Argument(help="The ONNX file.")],
    photos: Annotated[Path, typer.Argument(help="Folder of photos.")],
    runtime: Annotated[str, typer.Option(help="onnxruntime or openvino.")] = "onnxruntime",
    precision: Annotated[str, typer.Option(help="Of OpenVINO: fp32, bf16, fp16.")] = "fp32",
) -> None:
    """Do all photos into each FOLDER that stdin names, until it ends."""
    console.set_quiet(True)
    chosen = precision if runtime == "openvino" else None
    source = Source("predict", graph, runtime=runtime, precision=chosen)
    print("ready", flush=True)
    for line in sys.stdin:
        out = line.rstrip("\n")
        summary = predict_photos(source, [str(photos)], out, PredictSettings(), force=True)
        told = {
            "images": summary.images,
            "seconds": summary.seconds,
            "network_busy": summary.network_busy,
        }
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    typer.run(main)
