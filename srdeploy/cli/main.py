"""The `srdeploy` command: all verbs, and the one place where errors become lines and exit codes.

Exit codes: 0 all well; 1 a verdict failed or part of the input was skipped; 2 input that can't
be used.
"""

import errno
import sys
from typing import Annotated

import typer

from srdeploy import __version__, console
from srdeploy.cli import (
    bench_train_verb,
    bench_verb,
    certify_verb,
    data_verbs,
    demo_verb,
    doctor_verb,
    evaluate_verb,
    export_verbs,
    inspect_verb,
    model_verbs,
    predict_verb,
    pseudo_verb,
    recipe_verb,
    serve_verb,
    strip_verb,
    train_verbs,
)
from srdeploy.cli.two_words import TwoWords
from srdeploy.errors import UserError

app = typer.Typer(
    name="srdeploy",
    cls=TwoWords,
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


train_verbs.register(app)
recipe_verb.register(app)
pseudo_verb.register(app)
export_verbs.register(app)
certify_verb.register(app)
strip_verb.register(app)
evaluate_verb.register(app)
predict_verb.register(app)
serve_verb.register(app)
bench_verb.register(app)
bench_train_verb.register(app)
inspect_verb.register(app)
model_verbs.register(app)
demo_verb.register(app)
data_verbs.register(app)
doctor_verb.register(app)


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
