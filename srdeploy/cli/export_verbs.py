"""`srdeploy export`: the deployed graph, its engine, and the proof that it is the plain one."""

import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from srdeploy.cli.certify_verbs import report_lines
from srdeploy.cli.options import (
    BuilderName,
    BuilderOption,
    CalibrationCountOption,
    CalibrationOption,
    EndsOption,
    Force,
    Json,
    KeepOption,
    MaxBatchOption,
    NetworkOptions,
    PrecisionName,
    PrecisionOption,
    ProfileOption,
    Quiet,
    RefittableOption,
    SizesOption,
    SmOption,
    TargetOption,
    TimingCacheOption,
    TritonOption,
    TrtOption,
    WorkspaceOption,
)


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
        typer.Option(help="Folder to write (default: deploy/NAME of run, weights or function)."),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The network's weights: .safetensors, .pth or .ckpt."),
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The network's classes.json, or a run's spec.json."),
    ] = None,
    option: NetworkOptions = None,
    size: Annotated[
        str | None, typer.Option(metavar="HxW", help="The size that most images have.")
    ] = None,
    multiple: Annotated[
        int | None,
        typer.Option(help="The network takes multiples of this alone: pad in the graph.", min=1),
    ] = None,
    fixed_size: Annotated[
        bool, typer.Option("--fixed-size", help="The network takes images of --size alone.")
    ] = False,
    input: Annotated[
        Input,
        typer.Option(help="uint8: photos [N,H,W,3]. float32: normalised by the client, [N,3,H,W]."),
    ] = Input.UINT8,
    output: Annotated[
        Output, typer.Option(help="labels: class ids [N,H,W]. logits: scores [N,K,H,W].")
    ] = Output.LABELS,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Photos to compare torch and ONNX on (default: the run's samples, or synthetic "
            "images)."
        ),
    ] = None,
    precision: PrecisionOption = PrecisionName.FP32,
    target: TargetOption = None,
    keep: KeepOption = None,
    quantise_ends: EndsOption = False,
    calibration: CalibrationOption = None,
    calibration_images: CalibrationCountOption = 64,
    trt: TrtOption = False,
    builder: BuilderOption = BuilderName.TENSORRT,
    sm: SmOption = None,
    profile: ProfileOption = None,
    sizes_of: SizesOption = None,
    max_batch: MaxBatchOption = 4,
    workspace: WorkspaceOption = None,
    timing_cache: TimingCacheOption = None,
    refittable: RefittableOption = False,
    triton: TritonOption = None,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Export a plain network to ONNX and TensorRT, and certify that nothing of the training is in
    it.

    Writes model.onnx, manifest.json and certificate.json. The certificate
    compares the graph with that of a network built fresh from its name, and
    torch with onnxruntime on photos. Other precisions are converted from that
    graph and verified against it on photos (differences.html). Auxiliary
    heads, which the main output does not need, are left out and named. Exit
    code 1 where a line of the certificate fails; the files are written all the
    same. --trt adds an engine and its sidecar.

    A network of your own is imported from the working folder, and its code runs.

    Example: srdeploy export runs/night --out deploy/night

    Example: srdeploy export runs/night --precision fp16 --trt

    Example: srdeploy export runs/night --precision int8 --trt --builder rtx --sm 8.9

    Example: srdeploy export my_package.models:make_network --weights w.pth --classes classes.json
    """
    from srdeploy import console
    from srdeploy.export.engines.stage import EngineRequest, add_engine
    from srdeploy.export.pipeline import export_source
    from srdeploy.export.precision.stage import TypeOptions
    from srdeploy.export.source import open_source
    from srdeploy.export.triton import write_repository
    from srdeploy.precision import require_fitting
    from srdeploy.validation import parse_options, parse_size, validated

    console.set_quiet(quiet or as_json)
    types = validated(
        TypeOptions,
        {
            "precision": precision.value,
            "target": require_fitting(
                precision.value, None if target is None else target.value, engine=trt
            ),
            "keep": tuple(keep or ()),
            "ends": quantise_ends,
            "calibration": calibration,
            "calibration_count": calibration_images,
        },
        "srdeploy export",
    )
    request = EngineRequest.of_flags(
        trt,
        builder=builder.value,
        sm=tuple(sm or ()),
        profiles=tuple(profile or ()),
        sizes_of=sizes_of,
        max_batch=max_batch,
        workspace_gib=workspace,
        timing_cache=timing_cache,
        refittable=refittable,
    )
    source = open_source(
        run,
        weights=weights,
        classes=classes,
        options=parse_options(option or []),
        size=parse_size(size, "--size") if size is not None else None,
        multiple=multiple,
        fixed_size=fixed_size,
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
    app.command("export")(export)
