"""`srdeploy export`: the deployed graph, its engine, and the proof that it is the plain one."""

import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from srdeploy.cli.certify_verbs import report_lines
from srdeploy.cli.options import (
    NETWORK,
    BuilderName,
    BuilderOption,
    EngineConfigOption,
    Force,
    Json,
    KeepOption,
    NetworkOptions,
    PrecisionName,
    PrecisionOption,
    Quiet,
    SettingTexts,
    SmOption,
    TritonOption,
    TrtOption,
)
from srdeploy.cli.verbs import DEPLOY, add_verb


class Input(StrEnum):
    """What the deployed graph takes."""

    UINT8 = "uint8"
    FLOAT32 = "float32"


class Output(StrEnum):
    """What the deployed graph gives."""

    LABELS = "labels"
    LOGITS = "logits"
    BOTH = "both"


def export(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="Run folder, or a network: PACKAGE.MODULE:FUNCTION, or a built-in one's name.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder to write (default: deploy/NAME of run, weights or function).",
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The network's weights: .safetensors, .pth or .ckpt.",
            rich_help_panel=NETWORK,
        ),
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The network's classes.json, or a run's spec.json.",
            rich_help_panel=NETWORK,
        ),
    ] = None,
    option: NetworkOptions = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="HxW", help="The size that most images have.", rich_help_panel=NETWORK
        ),
    ] = None,
    input: Annotated[
        Input,
        typer.Option(
            metavar="TYPE",
            help="uint8: photos [N,H,W,3]. float32: normalised by the client, [N,3,H,W].",
        ),
    ] = Input.UINT8,
    output: Annotated[
        Output,
        typer.Option(
            metavar="KIND", help="labels: ids [N,H,W]. logits: scores [N,K,H,W]. Or both."
        ),
    ] = Output.LABELS,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Photos to compare torch and ONNX on (default: the run's samples, or drawn ones).",
        ),
    ] = None,
    precision: PrecisionOption = PrecisionName.FP32,
    keep: KeepOption = None,
    trt: TrtOption = False,
    builder: BuilderOption = BuilderName.TENSORRT,
    sm: SmOption = None,
    engine_config: EngineConfigOption = None,
    triton: TritonOption = None,
    settings: SettingTexts = None,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Export a plain network to ONNX and TensorRT, and certify that no training part is left in it.

    Writes model.onnx, manifest.json and certificate.json. The certificate compares the graph with
    that of a network built fresh from its name, and torch with onnxruntime on photos. Other
    precisions are converted from that graph and verified against it on photos (differences.html).
    Auxiliary heads, which the main output does not need, are left out and named. --trt adds an
    engine and its sidecar. The exit code is 1 if a line of the certificate fails; the files are
    still written.

    A network of your own is imported from the working folder, and its code runs.

    Settings for --set KEY=VALUE. Engine, also in --engine-config (YAML): profile
    (MIN,OPT,MAX shapes NxHxW, such as 1x32x32,1x360x480,4x720x960), sizes_of (folder of photos to
    take the profile from), max_batch (4), workspace (GiB), timing_cache (file), refittable. int8:
    target (tensorrt or cpu), quantise_ends, calibration (folder), calibration_images (64). A
    network of one size, or of multiples of N: fixed_size=true, multiple=N.

    Example: srdeploy export runs/night --out deploy/night

    Example: srdeploy export runs/night --precision fp16 --trt

    Example: srdeploy export runs/night --trt --builder rtx --sm 8.9

    Example: srdeploy export my_package.models:make_network --weights w.pth --classes classes.json
    """
    from srdeploy import console
    from srdeploy.cli.settings import EngineSettings, ExportSettings, load_settings
    from srdeploy.export.engines.stage import EngineRequest, add_engine
    from srdeploy.export.pipeline import export_source
    from srdeploy.export.precision.stage import TypeOptions
    from srdeploy.export.source import open_source
    from srdeploy.export.triton import write_repository
    from srdeploy.precision import require_fitting
    from srdeploy.validation import parse_options, parse_size, validated

    console.set_quiet(quiet or as_json)
    rare = load_settings(ExportSettings, settings or (), engine_config, EngineSettings)
    types = validated(
        TypeOptions,
        {
            "precision": precision.value,
            "target": require_fitting(precision.value, rare.target, engine=trt),
            "keep": tuple(keep or ()),
            "ends": rare.quantise_ends,
            "calibration": rare.calibration,
            "calibration_count": rare.calibration_images,
        },
        "srdeploy export",
    )
    request = EngineRequest.of_flags(
        trt,
        builder=builder.value,
        sm=tuple(sm or ()),
        profiles=rare.profile,
        sizes_of=rare.sizes_of,
        max_batch=rare.max_batch,
        workspace_gib=rare.workspace,
        timing_cache=rare.timing_cache,
        refittable=rare.refittable,
    )
    source = open_source(
        run,
        weights=weights,
        classes=classes,
        options=parse_options(option or []),
        size=parse_size(size, "--size") if size is not None else None,
        multiple=rare.multiple,
        fixed_size=rare.fixed_size,
        images=images,
    )
    if request is not None:
        request.require_ready(source.spec, types)
    with tempfile.TemporaryDirectory(prefix="srdeploy-") as aside:
        certified = Path(aside) / "certified.onnx" if request is not None else None
        result = export_source(
            source,
            out,
            input=input.value,
            output=output.value,
            types=types,
            force=force,
            certified=certified,
        )
        if request is not None and certified is not None:
            result = add_engine(result, source, types, request, certified)
    if triton is not None:
        repository = write_repository(result.folder, triton)
        console.done(f"Triton model repository: {repository}")
    if as_json:
        summary = {"folder": str(result.folder), "manifest": result.manifest}
        console.print_json({**summary, "certificate": result.certificate.summary()})
    else:
        megabytes = result.model.stat().st_size / 1e6
        opset = result.manifest["opset"]
        console.done(f"exported {result.model} ({megabytes:.1f} MB, opset {opset})")
        heads = [
            f"{head['name']} ({head['parameters']:,} parameters)"
            for head in result.manifest["auxiliary_heads_left_out"]
        ]
        if heads:
            console.done(f"auxiliary heads left out: {', '.join(heads)}")
        report_lines(result.certificate)
        if result.passed:
            console.say(f"next: srdeploy predict {result.folder} PHOTOS --out MASKS")
    if not result.passed:
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Adds `export` to the command line."""
    add_verb(app, "export", export, DEPLOY)
