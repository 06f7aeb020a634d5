"""Options that several verbs share, so that they read and behave alike."""

from pathlib import Path
from typing import Annotated

import typer

Artifact = Annotated[
    Path,
    typer.Argument(
        help="A run folder, a deploy folder, an .onnx or an .engine file.", show_default=False
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, nothing else there.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No messages and no progress bars.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N. Never falls back in silence.")]
Split = Annotated[
    str,
    typer.Option(
        help="Split of the data set, e.g. train, val or test; '+' joins several, as train+val."
    ),
]
RuntimeName = Annotated[
    str,
    typer.Option(
        "--runtime",
        help="auto, torch, onnxruntime, onnxruntime-tensorrt, openvino or tensorrt; auto goes by "
        "the artifact: torch for a run, onnxruntime for a graph, tensorrt for an engine.",
    ),
]
Arithmetic = Annotated[
    str | None,
    typer.Option(
        "--precision",
        help="Arithmetic of OpenVINO: fp32 (default), bf16 or fp16; other runtimes compute what "
        "the artifact's types say.",
    ),
]
Threads = Annotated[
    int | None, typer.Option(help="CPU threads of the runtime; all cores by default.", min=1)
]
Classes = Annotated[
    Path | None,
    typer.Option(
        "--classes",
        help="classes.json for an ONNX file without our metadata (names, palette, mean, std).",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace the output folder where it exists.")]
NetworkOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="KEY=VALUE",
        help="Keyword option of the network's builder, e.g. output_stride=8; may be repeated.",
    ),
]
