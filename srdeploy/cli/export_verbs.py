"""`srdeploy export` and `srdeploy certify`: the deployed graph, and the proof that it is the plain
one.
"""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from srdeploy.cli.options import Force, Json, Quiet

if TYPE_CHECKING:
    from srdeploy.export.certificate import Certificate


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
    run: Annotated[Path, typer.Argument(help="Run folder that srdeploy train wrote.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder to write (default: deploy/NAME of the run).")
    ] = None,
    input: Annotated[
        Input,
        typer.Option(help="uint8: photos [N,H,W,3]. float32: normalised by the client, [N,3,H,W]."),
    ] = Input.UINT8,
    output: Annotated[
        Output, typer.Option(help="labels: class ids [N,H,W]. logits: scores [N,K,H,W].")
    ] = Output.LABELS,
    images: Annotated[
        Path | None,
        typer.Option(help="Photos to compare torch and ONNX on (default: the run's samples)."),
    ] = None,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Export a run's plain network to ONNX, and certify that nothing of the training is in it.

    Writes model.onnx, manifest.json and certificate.json. The certificate
    compares the graph with that of a network built fresh from its name, and
    torch with onnxruntime on photos. Exit code 1 where a line of it fails; the
    files are written all the same.

    Example: srdeploy export runs/night --out deploy/night
    """
    from srdeploy import console
    from srdeploy.export.pipeline import export_run

    console.set_quiet(quiet or as_json)
    result = export_run(
        run, out, input=input.value, output=output.value, images=images, force=force
    )
    if as_json:
        summary = {"folder": str(result.folder), "manifest": result.manifest}
        console.print_json({**summary, "certificate": result.certificate.summary()})
    else:
        megabytes = result.model.stat().st_size / 1e6
        opset = result.manifest["opset"]
        console.done(f"exported {result.model} ({megabytes:.1f} MB, opset {opset})")
        _report(result.certificate)
        if result.passed:
            console.say(f"next: srdeploy predict {result.folder} PHOTOS --out MASKS")
    if not result.passed:
        raise typer.Exit(1)


def certify(
    a: Annotated[Path, typer.Argument(help="The plain network's .onnx file or deploy folder.")],
    b: Annotated[Path, typer.Argument(help="The .onnx file or deploy folder to certify.")],
    out: Annotated[Path | None, typer.Option(help="Also write the certificate here.")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Certify that two ONNX files hold the same graph, whatever their weights and names.

    Two independent checks must agree. The first differing node is named, and
    so is the first node that only B has. Exit code 1 where a line fails.

    Example: srdeploy certify deploy/baseline deploy/regulated
    """
    from srdeploy import console
    from srdeploy.export.certificate import certify_files

    console.set_quiet(quiet or as_json)
    certificate = certify_files(a, b)
    if out is not None:
        certificate.write(out)
    if as_json:
        console.print_json(certificate.summary())
    else:
        _report(certificate)
    if not certificate.passed:
        raise typer.Exit(1)


def _report(certificate: "Certificate") -> None:
    from srdeploy import console

    for line in certificate.lines:
        text = f"{line.name}: {line.detail}"
        if line.passed is None:
            console.say(f"  {text}")
        elif line.passed:
            console.done(text)
        else:
            console.failed(text)


def register(app: typer.Typer) -> None:
    """Adds `export` and `certify` to the command line."""
    app.command("export")(export)
    app.command("certify")(certify)
