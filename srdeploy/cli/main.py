"""The `srdeploy` command: all verbs, and the one place where errors become lines and exit codes.

Exit codes: 0 all well; 1 a verdict failed or part of the input was skipped; 2 input that can't
be used.
"""

import errno
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

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
from srdeploy.errors import UserError


class SubcommandGroup(TyperGroup):
    """A group whose commands may have names of two words: `bench train` beside `bench`.

    The longer name wins. Not a group within the group: `bench` takes arguments of its own.
    """

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """(name, command, what is left of args), as typer's own."""
        both = " ".join(args[:2])
        if len(args) > 1 and both in self.commands:
            args = [both, *args[2:]]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="srdeploy",
    cls=SubcommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Train semantic segmentation with self-regulation, deploy the plain network, and prove "
        "that it is the plain one.\n\n"
        "First steps: srdeploy demo (minutes, no GPU), then srdeploy train DATA, "
        "srdeploy export RUN, srdeploy predict DEPLOY PHOTOS --out MASKS."
    ),
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"srdeploy {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    pass


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
    from srdeploy.studies.demo import run_demo

    console.set_quiet(quiet or as_json)
    outcome = run_demo(out, steps=steps, seed=seed, force=force)
    if as_json:
        console.print_json(outcome.summary)
    if not outcome.passed:
        raise typer.Exit(1)


def doctor(context: typer.Context, as_json: Json = False) -> None:
    """Try what each verb can do on this machine, and say what is missing for the rest.

    Shows GPUs, driver and packages. Every line is tried on a tiny network: a training step,
    exports, engines, a run in each runtime. Takes some seconds. The exit code is 1 only where the
    environment is broken, such as with both packages of onnxruntime; what is merely not installed
    is no fault.

    Example: srdeploy doctor

    Example: srdeploy doctor --json > machine.json
    """
    from srdeploy import console
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


train_verbs.register(app)
pseudo_verb.register(app)
export_verbs.register(app)
certify_verbs.register(app)
evaluate_verb.register(app)
predict_verb.register(app)
serve_verb.register(app)
bench_verb.register(app)
bench_train_verb.register(app)
network_verbs.register(app)
app.command("demo")(demo)
data_verbs.register(app)
app.command("doctor")(doctor)


def main() -> None:
    """Runs the command line and exits."""
    try:
        app()
    except UserError as error:
        _refuse(str(error))
    except OSError as error:
        # A full disk can strike in any write, also inside libraries; everything else is a bug of
        # ours.
        if error.errno != errno.ENOSPC:
            raise
        _refuse(
            f"no space left on the device ({error.filename or 'while writing'}): free some space"
        )


def _refuse(message: str) -> None:
    console.error(message)
    sys.exit(2)
