"""`srdeploy doctor`: what this machine has, and what each verb can do here."""

import typer

from srdeploy.cli.options import Json


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
    from srdeploy.cli.doctor import diagnose

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


def register(app: typer.Typer) -> None:
    """Adds the verb to the command line."""
    app.command("doctor")(doctor)
