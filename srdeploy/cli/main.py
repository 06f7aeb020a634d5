"""The `srdeploy` command: all verbs, and the one place where errors become lines and exit codes."""

import errno
import sys
from pathlib import Path
from typing import Annotated

import typer

from srdeploy import __version__, console
from srdeploy.cli import (
    bench_train_verb,
    bench_verb,
    certify_verbs,
    data_verbs,
    evaluate_verb,
    export_verbs,
    network_verbs,
    predict_verb,
    pseudo_verb,
    serve_verb,
    train_verbs,
)
from srdeploy.cli.options import Force, Json, Quiet
from srdeploy.cli.verbs import FIRST, SubcommandGroup, add_verb
from srdeploy.errors import UserError, missing_package

app = typer.Typer(
    name="srdeploy",
    cls=SubcommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Train semantic segmentation with self-regulation, deploy the plain network, and prove "
        "that it is the plain one.\n\n"
        "Example: srdeploy demo (minutes, no GPU)\n\n"
        "Example: srdeploy train DATA --out RUN, srdeploy export RUN --out DEPLOY, "
        "srdeploy predict DEPLOY PHOTOS --out MASKS"
    ),
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"srdeploy {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


def demo(
    out: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="Folder for data, runs, exports and report.html."),
    ] = Path("demo"),
    steps: Annotated[
        int, typer.Option(metavar="N", help="Training steps of each network.", min=1)
    ] = 400,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of data and training.")] = 0,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run the whole job on synthetic data: train two networks, deploy, compare, report.

    Makes data, trains, exports, certifies, evaluates, benchmarks and predicts. It takes minutes on
    two cores without a GPU and downloads nothing. Open OUT/report.html afterwards.

    Example: srdeploy demo --out demo
    """
    from srdeploy.studies.demo import run_demo

    console.set_quiet(quiet or as_json)
    outcome = run_demo(out, steps=steps, seed=seed, force=force)
    if as_json:
        console.print_json(outcome.summary)
    if not outcome.passed:
        raise typer.Exit(1)


def doctor(context: typer.Context, as_json: Json = False) -> None:
    """Try what each verb can do on this machine, and report what is missing for the rest.

    Shows GPUs, driver and packages. Tries every line on a tiny network: a training step, exports,
    engines, a run in each runtime. Takes some seconds. The exit code is 1 only if the environment
    is broken, such as with both packages of onnxruntime; a package that is not installed is no
    fault.

    Example: srdeploy doctor

    Example: srdeploy doctor --json > machine.json
    """
    from srdeploy.studies.doctor import diagnose

    verbs = getattr(context.find_root().command, "commands")  # noqa: B009
    offered = {
        name: frozenset(option for parameter in command.params for option in parameter.opts)
        for name, command in verbs.items()
    }
    found = diagnose(offered)
    if as_json:
        console.print_json(found.model_dump(mode="json"))
    else:
        for table in found.tables():
            console.print_table(table)
    for problem in found.problems:
        console.failed(problem)
    if found.problems:
        raise typer.Exit(1)


add_verb(app, "demo", demo, FIRST)
add_verb(app, "doctor", doctor, FIRST)
for verbs in (
    data_verbs,
    train_verbs,
    pseudo_verb,
    network_verbs,
    export_verbs,
    certify_verbs,
    predict_verb,
    serve_verb,
    evaluate_verb,
    bench_verb,
    bench_train_verb,
):
    verbs.register(app)


def main() -> None:
    """Runs the command line and exits."""
    try:
        app()
    except UserError as error:
        _refuse(str(error))
    except ModuleNotFoundError as error:
        missing = missing_package(error, f"srdeploy {' '.join(sys.argv[1:2])}".rstrip())
        if missing is None:
            raise
        _refuse(str(missing))
    except OSError as error:
        # Any write can meet a full disk, in libraries too; every other error is a bug of ours.
        if error.errno != errno.ENOSPC:
            raise
        _refuse(
            f"no space left on the device ({error.filename or 'while writing'}): free some space"
        )


def _refuse(message: str) -> None:
    console.error(message)
    sys.exit(2)
