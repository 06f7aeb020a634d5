"""`srdeploy models`: which networks there are, and what they cost."""

from typing import Annotated

import typer

from srdeploy.cli.options import Json, NetworkOptions, Quiet
from srdeploy.validation import parse_options


def models(
    name: Annotated[
        str | None,
        typer.Argument(
            help="One network in detail: a built-in one's name, or my_package.models:make_network.",
            show_default=False,
        ),
    ] = None,
    classes: Annotated[int, typer.Option(help="Classes that the network tells apart.", min=2)] = 21,
    size: Annotated[
        str, typer.Option(metavar="HxW", help="Size of the image that work is counted for.")
    ] = "512x1024",
    option: NetworkOptions = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """List the networks: parameters, work, stages, and what self-regulation adds in training.

    Work is that of one forward, and counts convolutions and matrix products. The exits are the
    default ones, of one per stage; nothing is left of them in what is deployed.

    Example: srdeploy models

    Example: srdeploy models hourglass --classes 16 --size 256x256 --option stacks=8
    """
    from srdeploy import console
    from srdeploy.cli.network_cost import network_cost, network_table, networks_table
    from srdeploy.errors import UserError
    from srdeploy.models import NETWORKS
    from srdeploy.validation import parse_size

    console.set_quiet(quiet or as_json)
    wanted = parse_size(size, "--size")
    if name is not None:
        cost = network_cost(name, classes, wanted, parse_options(option or []))
        if as_json:
            console.print_json(cost.summary())
        else:
            console.print_table(network_table(cost))
        return
    if option:
        raise UserError("--option is for one network: name it, such as srdeploy models unet")
    names = console.track(NETWORKS, "counting", total=len(NETWORKS))
    costs = [network_cost(one, classes, wanted, {}) for one in names]
    if as_json:
        networks = [cost.summary() for cost in costs]
        console.print_json({"classes": classes, "size": list(wanted), "networks": networks})
    else:
        console.print_table(networks_table(costs))


def register(app: typer.Typer) -> None:
    """Adds `models` to the command line."""
    app.command("models")(models)
