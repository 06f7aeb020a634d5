"""`srdeploy recipes`: the configurations that come with the package."""

from typing import Annotated

import typer

from srdeploy.cli.options import Json, Quiet


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(help="One recipe, NETWORK/DATA: print its YAML.", show_default=False),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """List the recipes for `srdeploy train --recipe`, or print one.

    A recipe is any network below with any data set. What is printed of one can be saved, changed,
    and given to train as --config.

    Example: srdeploy recipes

    Example: srdeploy recipes segnet/camvid > mine.yaml
    """
    from srdeploy import console
    from srdeploy.train.recipe import DATA, NETWORKS, open_recipe, recipe_parts

    console.set_quiet(quiet or as_json)
    if name is None:
        parts = {kind: recipe_parts(kind) for kind in (NETWORKS, DATA)}
        if as_json:
            console.print_json(parts)
            return
        for kind, about in parts.items():
            typer.echo(f"{kind}:")
            width = max(map(len, about))
            for part, line in about.items():
                typer.echo(f"  {part:{width}}  {line}")
        typer.echo("a recipe is NETWORK/DATA: srdeploy train DATA --recipe NETWORK/DATA --out RUN")
        return
    recipe = open_recipe(name)
    if as_json:
        console.print_json({"name": recipe.name, "values": recipe.values})
    else:
        typer.echo(recipe.text, nl=False)


def register(app: typer.Typer) -> None:
    """Adds `recipes` to the command line."""
    app.command("recipes")(recipes)
