"""`srdeploy demo`: the whole job on made-up data, and one page that shows it."""

from pathlib import Path
from typing import Annotated

import typer

from srdeploy.cli.options import Force, Json, Quiet


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for data, runs, exports and report.html.")
    ] = Path("demo"),
    steps: Annotated[
        int, typer.Option(help="Training steps of each of the two networks.", min=1)
    ] = 400,
    seed: Annotated[int, typer.Option(help="Seed of the data and of both trainings.")] = 0,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Make data, train two networks, export, certify, evaluate, bench, predict, report.

    Takes minutes on two cores without a GPU and downloads nothing. Open OUT/report.html afterwards.

    Example: srdeploy demo --out demo
    """
    from srdeploy import console
    from srdeploy.cli.demo import run_demo

    console.set_quiet(quiet or as_json)
    outcome = run_demo(out, steps=steps, seed=seed, force=force)
    if as_json:
        console.print_json(outcome.summary)
    if not outcome.passed:
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Adds `demo` to the command line."""
    app.command("demo")(demo)
