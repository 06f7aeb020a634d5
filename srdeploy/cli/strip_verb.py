"""`srdeploy strip`: an ONNX file of any tool without its auxiliary outputs."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from srdeploy.cli.certify_verb import report_lines
from srdeploy.cli.options import Json, Quiet

if TYPE_CHECKING:
    from collections.abc import Sequence

    from srdeploy.export.output_shares import OutputShare


def strip(
    model: Annotated[Path, typer.Argument(help="An .onnx file, of any tool, or a deploy folder.")],
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="OUTPUT", help="Output to keep; may be repeated."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write (default: NAME.stripped.onnx beside it).")
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(
            help="classes.json (names, palette, mean, std) to attach, so that no verb asks for it."
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Photos to compare both files on (default: pictures are drawn)."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file to write.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Remove auxiliary outputs from an ONNX file, with all that only they need.

    Auxiliary heads cost time wherever they are left in a graph, also where
    nobody asks for their output. What stays is the original's byte for byte:
    weights, names, operator set. Without --keep the outputs are listed with
    what each of them costs. A certificate is written beside the file; exit
    code 1 where a line of it fails, the file is written all the same.

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
        note = ": nothing was there to strip" if result.removed.nothing else ""
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
    from srdeploy.export.onnx_files import load_model
    from srdeploy.export.output_shares import likely_main, output_shares

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
    """Adds `strip` to the command line."""
    app.command("strip")(strip)
