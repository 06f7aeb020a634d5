"""`srdeploy certify` and `srdeploy strip`: what proves a graph plain, and what makes one plain."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from srdeploy.cli.options import BuilderName, BuilderOption, Json, Quiet, SmOption
from srdeploy.cli.verbs import DEPLOY, add_verb

if TYPE_CHECKING:
    from srdeploy.export.certificate import Certificate, Line
    from srdeploy.graph.outputs import OutputShare


def certify(
    a: Annotated[Path, typer.Argument(help="The plain network's .onnx file or deploy folder.")],
    b: Annotated[Path, typer.Argument(help="The .onnx file or deploy folder to certify.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the certificate.")
    ] = None,
    refit: Annotated[
        bool,
        typer.Option(
            "--refit",
            help="Also certify that the TensorRT engines differ only in their weights.",
        ),
    ] = False,
    builder: BuilderOption = BuilderName.TENSORRT,
    sm: SmOption = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Certify that two ONNX files hold the same graph, whatever their weights and names.

    Two independent checks must agree. The first differing node is named, and so is the first node
    that only B has. The exit code is 1 if a line fails.

    --refit on a GPU: an engine built from A and refitted with B's weights must compute what one
    built from B does. --refit --builder rtx --sm X.Y, without a GPU: the two plans must be equal
    byte for byte except for the weights.

    Example: srdeploy certify deploy/baseline deploy/regulated

    Example: srdeploy certify deploy/baseline deploy/regulated --refit --builder rtx --sm 8.9
    """
    from srdeploy import console
    from srdeploy.errors import UserError
    from srdeploy.export.certificate import Certificate, certify_files

    console.set_quiet(quiet or as_json)
    if sm and not refit:
        raise UserError("--sm is about engines: add --refit, or leave it out")
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


def strip(
    model: Annotated[Path, typer.Argument(help="An .onnx file, of any tool, or a deploy folder.")],
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="OUTPUT", help="Output to keep; may be repeated."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File to write (default: NAME.stripped.onnx beside it)."),
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="classes.json (names, palette, mean, std) to attach, so that no verb asks for it.",
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Photos to compare both files on (default: drawn pictures)."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file to write.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Remove auxiliary outputs from an ONNX file, with all that only they need.

    Auxiliary heads cost time wherever they are left in a graph, even if nobody asks for their
    output. What stays is the original's byte for byte: weights, names, operator set. Without --keep
    it lists the outputs and what each of them costs. A certificate is written beside the file; the
    exit code is 1 if a line of it fails, and the file is still written.

    Example: srdeploy strip model.onnx

    Example: srdeploy strip model.onnx --keep out --classes classes.json
    """
    from srdeploy import console
    from srdeploy.export.strip import strip_file

    console.set_quiet(quiet or as_json)
    if not keep:
        _list_outputs(model, as_json)
    result = strip_file(model, keep or (), out, classes=classes, images=images, force=force)
    if as_json:
        console.print_json(
            {
                "file": str(result.file),
                "kept": list(result.kept),
                "removed": result.removed.model_dump(mode="json"),
                "certificate_file": str(result.certificate_file),
                "certificate": result.certificate.summary(),
            }
        )
    else:
        size = result.file.stat().st_size / 1e6
        note = ": there was nothing to strip" if result.removed.nothing else ""
        console.done(f"wrote {result.file} ({size:.2f} MB){note}")
        report_lines(result.certificate)
        if result.passed and result.spec is not None:
            console.say(f"next: srdeploy predict {result.file} PHOTOS --out MASKS")
    if not result.passed:
        raise typer.Exit(1)


def _list_outputs(model: Path, as_json: bool) -> None:
    """Shows the outputs of a file that has several, and refuses to choose."""
    from srdeploy import console
    from srdeploy.errors import UserError
    from srdeploy.export.certificate import model_file
    from srdeploy.export.strip import load_model
    from srdeploy.graph.outputs import likely_main, output_shares

    graph = load_model(model_file(model))
    shares = output_shares(graph)
    if len(shares) == 1:
        return
    main = likely_main(graph, shares)
    if as_json:
        listed = [share.model_dump(mode="json") for share in shares]
        console.print_json({"outputs": listed, "likely_main": main})
    else:
        _print_outputs(model, shares, main)
    line = shlex.join(["srdeploy", "strip", str(model), "--keep", main])
    raise UserError(
        f"{model} has {len(shares)} outputs: say which to keep. '{main}' looks like the main one: "
        f"{line}"
    )


def _print_outputs(model: Path, shares: "Sequence[OutputShare]", main: str) -> None:
    from rich.markup import escape
    from rich.table import Table

    from srdeploy import console

    table = Table(title=f"outputs of {escape(str(model))}", title_justify="left")
    for header in ("output", "dtype", "shape"):
        table.add_column(header)
    for header in ("own nodes", "own parameters", "own MB"):
        table.add_column(header, justify="right")
    table.caption = "own: what no other output needs"
    table.caption_justify = "left"
    for share in shares:
        table.add_row(
            escape(share.name) + (" (the main one?)" if share.name == main else ""),
            share.dtype,
            escape(share.shape_text),
            f"{share.nodes:,}",
            f"{share.parameters:,}",
            f"{share.bytes / 1e6:.2f}",
        )
    console.print_table(table)


def register(app: typer.Typer) -> None:
    """Adds `certify` and `strip` to the command line."""
    add_verb(app, "certify", certify, DEPLOY)
    add_verb(app, "strip", strip, DEPLOY)
