"""Options that several verbs share, so that they read and behave alike."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

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


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
    """["width=8"] as {"width": 8}; values are read as YAML. Raises UserError."""
    import yaml

    from srdeploy.errors import UserError

    options: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key.isidentifier():
            raise UserError(f"--option {text}: needs KEY=VALUE, such as --option output_stride=8")
        if key in options:
            raise UserError(f"--option {key} is given twice")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--option {text}: the value is not valid YAML") from error
    return options
