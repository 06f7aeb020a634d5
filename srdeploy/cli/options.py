"""Options that several verbs share, so that they read and behave alike."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from srdeploy.runtimes.registry import precision_help, runtime_help

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
        help=f"{runtime_help()}.",
    ),
]
Arithmetic = Annotated[
    str | None,
    typer.Option(
        "--precision",
        help=f"{precision_help()}; other runtimes compute what the artifact's types say.",
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


# Options of `srdeploy export` about what is deployed: types, engines, hand-over formats.

TYPES = "Precision"
ENGINE = "TensorRT"
HAND_OVER = "Hand-over"


class PrecisionName(StrEnum):
    """Of the arithmetic inside; inputs and outputs keep their types."""

    FP32 = "fp32"
    TF32 = "tf32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"


class TargetName(StrEnum):
    """For whom int8 is written."""

    TENSORRT = "tensorrt"
    CPU = "cpu"


class BuilderName(StrEnum):
    """Which TensorRT builds."""

    TENSORRT = "tensorrt"
    RTX = "rtx"


PrecisionOption = Annotated[
    PrecisionName,
    typer.Option(
        "--precision",
        help="Types inside the graph; what goes in and comes out keeps its type. tf32: in engines.",
        rich_help_panel=TYPES,
    ),
]
TargetOption = Annotated[
    TargetName | None,
    typer.Option(
        "--target",
        help="int8 for tensorrt (symmetric) or cpu (u8s8, fast in the CPU's runtimes); "
        "by default tensorrt with --trt, else cpu.",
        show_default=False,
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
EndsOption = Annotated[
    bool,
    typer.Option(
        "--quantise-ends",
        help="int8: quantise the first and last layers too.",
        rich_help_panel=TYPES,
    ),
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="FOLDER",
        help="int8: photos to measure ranges on (default: the training photos of the run).",
        show_default=False,
        rich_help_panel=TYPES,
    ),
]
CalibrationCountOption = Annotated[
    int,
    typer.Option(
        "--calibration-images", help="int8: how many of them.", min=1, rich_help_panel=TYPES
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
ProfileOption = Annotated[
    list[str] | None,
    typer.Option(
        "--profile",
        metavar="MIN,OPT,MAX",
        help="Shapes NxHxW, e.g. 1x32x32,1x360x480,4x720x960; may be repeated "
        "(default: from the network's sizes).",
        show_default=False,
        rich_help_panel=ENGINE,
    ),
]
SizesOption = Annotated[
    Path | None,
    typer.Option(
        "--sizes-of",
        metavar="FOLDER",
        help="Take the profile's sizes from these photos.",
        show_default=False,
        rich_help_panel=ENGINE,
    ),
]
MaxBatchOption = Annotated[
    int,
    typer.Option(
        "--max-batch", help="Largest batch of the profile.", min=1, rich_help_panel=ENGINE
    ),
]
WorkspaceOption = Annotated[
    float | None,
    typer.Option(
        "--workspace",
        metavar="GIB",
        help="Memory that the builder may try kernels with (default: the GPU's).",
        show_default=False,
        rich_help_panel=ENGINE,
    ),
]
TimingCacheOption = Annotated[
    Path | None,
    typer.Option(
        "--timing-cache",
        metavar="FILE",
        help="Kernel timings, read and written: the next build takes a fraction of the time.",
        show_default=False,
        rich_help_panel=ENGINE,
    ),
]
RefittableOption = Annotated[
    bool,
    typer.Option(
        "--refittable",
        help="Let the engine take other weights without a build.",
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

Steps = Annotated[int | None, typer.Option(help="Optimizer steps (default: 2000).")]
Batch = Annotated[int | None, typer.Option(help="Images per forward pass (default: 8).")]
Crop = Annotated[
    str | None, typer.Option(metavar="HxW", help="Size of training crops (default: 320x320).")
]
Rate = Annotated[float | None, typer.Option(help="Highest learning rate (default: 0.01).")]
Pretrained = Annotated[
    str | None, typer.Option(metavar="FILE|imagenet", help="Backbone weights to start from.")
]
Seed = Annotated[int | None, typer.Option(help="Of start, order and views (default: 0).")]
TrainingDevice = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:N, or auto, which says what it took.")
]
Workers = Annotated[
    int | None, typer.Option(help="Threads that read and augment photos (default: 2).")
]
