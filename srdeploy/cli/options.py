"""Options that several verbs share, so that they read and behave alike."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from srdeploy.runtimes.registry import precision_help, runtime_help

NETWORK = "Network"

Artifact = Annotated[
    Path,
    typer.Argument(
        help="A run folder, a deploy folder, an .onnx or an .engine file.", show_default=False
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object, and only that, on stdout.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No messages and no progress bars.")]
Device = Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda or cuda:N; no fallback.")]
Split = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Split of the data set, e.g. train, val or test; '+' joins several, as train+val.",
    ),
]
RuntimeName = Annotated[
    str,
    typer.Option(
        "--runtime",
        metavar="NAME",
        help=f"{runtime_help()}.",
    ),
]
Arithmetic = Annotated[
    str | None,
    typer.Option(
        "--precision",
        metavar="TYPE",
        help=f"{precision_help()}; other runtimes follow the artifact's types.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(metavar="N", help="CPU threads of the runtime; all cores by default.", min=1),
]
Classes = Annotated[
    Path | None,
    typer.Option(
        "--classes",
        metavar="FILE",
        help="classes.json for an ONNX file without our metadata (names, palette, mean, std).",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output folder.")]
SettingTexts = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A setting from above; may be repeated.",
    ),
]
NetworkOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="KEY=VALUE",
        help="Keyword option of the network's builder, e.g. output_stride=8; may be repeated.",
        rich_help_panel=NETWORK,
    ),
]


# Options of `srdeploy export` about what is deployed: types, engines, hand-over formats.

TYPES = "Precision"
ENGINE = "TensorRT"
HAND_OVER = "Hand-over"


class PrecisionName(StrEnum):
    """Arithmetic inside the graph; inputs and outputs keep their types."""

    FP32 = "fp32"
    TF32 = "tf32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"


class BuilderName(StrEnum):
    """Which TensorRT builds the engine."""

    TENSORRT = "tensorrt"
    RTX = "rtx"


PrecisionOption = Annotated[
    PrecisionName,
    typer.Option(
        "--precision",
        metavar="TYPE",
        help="Types inside the graph: fp32, fp16, bf16 or int8; tf32 in engines. Inputs and "
        "outputs keep their type.",
        rich_help_panel=TYPES,
    ),
]
KeepOption = Annotated[
    list[str] | None,
    typer.Option(
        "--keep",
        metavar="NODE",
        help="Node that stays float32, or a pattern such as 'network/head/*'; may be repeated.",
        show_default=False,
        rich_help_panel=TYPES,
    ),
]
TrtOption = Annotated[
    bool,
    typer.Option("--trt", help="Also build a TensorRT engine.", rich_help_panel=ENGINE),
]
BuilderOption = Annotated[
    BuilderName,
    typer.Option(
        "--builder",
        metavar="NAME",
        help="tensorrt: on this machine's GPU. rtx: TensorRT for RTX, ahead of time with --sm.",
        rich_help_panel=ENGINE,
    ),
]
SmOption = Annotated[
    list[str] | None,
    typer.Option(
        "--sm",
        metavar="X.Y",
        help="rtx: compute capability to build for, e.g. 8.9; may be repeated. No GPU is needed.",
        show_default=False,
        rich_help_panel=ENGINE,
    ),
]
EngineConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--engine-config",
        metavar="FILE",
        help="YAML file of the engine's settings: see above.",
        show_default=False,
        rich_help_panel=ENGINE,
    ),
]
TritonOption = Annotated[
    Path | None,
    typer.Option(
        "--triton",
        metavar="DIR",
        help="Also write the model into this Triton model repository.",
        show_default=False,
        rich_help_panel=HAND_OVER,
    ),
]


# Options of the verbs that train: a network by `train`, a classifier of tags by `pseudo`.

OPTIMISATION = "Optimisation"
CONFIGURATION = "Configuration"
SUPERVISION = "Image tags instead of masks"
RUN = "Run"

Steps = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Optimizer steps (default: 2000).", rich_help_panel=OPTIMISATION
    ),
]
Batch = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Images per forward pass (default: 8).", rich_help_panel=OPTIMISATION
    ),
]
Crop = Annotated[
    str | None,
    typer.Option(
        metavar="HxW",
        help="Size of training crops (default: 320x320).",
        rich_help_panel=OPTIMISATION,
    ),
]
Rate = Annotated[
    float | None,
    typer.Option(
        metavar="RATE",
        help="Highest learning rate (default: 0.01).",
        rich_help_panel=OPTIMISATION,
    ),
]
Pretrained = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|imagenet", help="Backbone weights to start from.", rich_help_panel=NETWORK
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Seed of weights, order and augmentation (default: 0).",
        rich_help_panel=OPTIMISATION,
    ),
]
TrainingDevice = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="cpu, cuda, cuda:N, or auto, which reports its choice.",
        rich_help_panel=RUN,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Threads that read and augment photos (default: 2).",
        rich_help_panel=RUN,
    ),
]
