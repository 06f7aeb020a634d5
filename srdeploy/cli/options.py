"""Options that several verbs share, so that they read and behave alike."""

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, nothing else there.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No messages and no progress bars.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N. Never falls back in silence.")]
Split = Annotated[str, typer.Option(help="Split of the data set, e.g. train, val or test.")]
RuntimeName = Annotated[
    str, typer.Option("--runtime", help="auto, torch or onnxruntime; auto goes by the artifact.")
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
