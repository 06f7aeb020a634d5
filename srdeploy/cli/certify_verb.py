"""`srdeploy certify`: two files hold one graph, whatever their weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from srdeploy.cli.deployment_options import BuilderName, BuilderOption, SmOption
from srdeploy.cli.options import Json, Quiet

if TYPE_CHECKING:
    from srdeploy.export.certificate import Certificate, Line


def certify(
    a: Annotated[Path, typer.Argument(help="The plain network's .onnx file or deploy folder.")],
    b: Annotated[Path, typer.Argument(help="The .onnx file or deploy folder to certify.")],
    out: Annotated[Path | None, typer.Option(help="Also write the certificate here.")] = None,
    refit: Annotated[
        bool,
        typer.Option(
            "--refit",
            help="Also on TensorRT engines: B's differs from A's in its weights alone.",
        ),
    ] = False,
    builder: BuilderOption = BuilderName.TENSORRT,
    sm: SmOption = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Certify that two ONNX files hold the same graph, whatever their weights and names.

    Two independent checks must agree. The first differing node is named, and
    so is the first node that only B has. Exit code 1 where a line fails.

    --refit, on a GPU: an engine built from A, given B's weights without a build, must do as one
    built from B. With --builder rtx --sm X.Y, without a GPU: the two plans must be equal byte for
    byte but for the weights.

    Example: srdeploy certify deploy/baseline deploy/regulated

    Example: srdeploy certify deploy/baseline deploy/regulated --refit --builder rtx --sm 8.9
    """
    from srdeploy import console
    from srdeploy.errors import UserError
    from srdeploy.export.certificate import Certificate, certify_files

    console.set_quiet(quiet or as_json)
    if sm and not refit:
        raise UserError("--sm is about engines: add --refit, or leave it away")
    certificate = certify_files(a, b)
    if refit:
        line = _refit(a, b, builder.value, tuple(sm or ()))
        certificate = Certificate(lines=(*certificate.lines, line))
    if out is not None:
        certificate.write(out)
    if as_json:
        console.print_json(certificate.summary())
    else:
        report_lines(certificate)
    if not certificate.passed:
        raise typer.Exit(1)


def _refit(a: Path, b: Path, builder: str, sm: tuple[str, ...]) -> "Line":
    """The line `refit` for two files of one precision."""
    from srdeploy.export.certificate import model_file, read_model
    from srdeploy.export.engines.build import BuildOptions
    from srdeploy.export.engines.refit import refit_line
    from srdeploy.precision import precision_of
    from srdeploy.validation import validated

    baseline, regulated = model_file(a), model_file(b)
    metadata = {entry.key: entry.value for entry in read_model(baseline).metadata_props}
    values = {"builder": builder, "sm": sm, "precision": precision_of(metadata)}
    return refit_line(baseline, regulated, validated(BuildOptions, values, "--refit"))


def report_lines(certificate: "Certificate") -> None:
    """Shows a certificate, one line for each of its own."""
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
    """Adds the verb to the command line."""
    app.command("certify")(certify)
