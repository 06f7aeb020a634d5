"""How a verb joins the command line: its help as paragraphs, its panel, and flags that moved."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from srdeploy.errors import UserError

FIRST = "First steps"
TRAIN = "Train"
DEPLOY = "Deploy and prove"
USE = "Use and measure"

MOVED = {
    "export": (
        *("profile", "sizes_of", "max_batch", "workspace", "timing_cache", "refittable"),
        *("target", "quantise_ends", "calibration", "calibration_images"),
        *("multiple", "fixed_size"),
    ),
    "serve": (
        *("sessions", "threads", "max_batch", "max_wait_ms", "max_body_mib", "max_megapixels"),
        *("max_network_megapixels", "max_images", "max_waiting", "max_waiting_mib"),
        *("timeout", "drain"),
    ),
    "predict": (
        *("list", "probabilities", "rle", "overlap", "max_megapixels", "threads", "batch"),
        *("ray_address", "actors"),
    ),
}
"""Settings that were options once, by verb: keys of --set now."""


class SubcommandGroup(TyperGroup):
    """A group whose commands may have names of two words: `bench train` beside `bench`.

    The longer name wins. It is no group within the group: `bench` takes arguments of its own.
    """

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """(name, command, the remaining arguments), as typer's own."""
        both = " ".join(args[:2])
        if len(args) > 1 and both in self.commands:
            args = [both, *args[2:]]
        if not ctx.resilient_parsing:
            _refuse_moved(args[0], args[1:])
        return super().resolve_command(ctx, args)


def add_verb(
    app: typer.Typer, name: str, verb: Callable[..., None], panel: str | None = None
) -> None:
    """Adds `verb` under `name`. Its docstring is the help; its paragraphs wrap to the terminal."""
    paragraphs = inspect.cleandoc(verb.__doc__ or "").split("\n\n")
    text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    app.command(name, help=text, rich_help_panel=panel)(verb)


def _refuse_moved(verb: str, args: Sequence[str]) -> None:
    """Raises UserError for a flag that became a setting, and says where it went."""
    for word in args:
        if word == "--":
            return
        flag = word.partition("=")[0]
        key = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and key in MOVED.get(verb, ()):
            raise UserError(f"{flag} is a setting now: give --set {key}=VALUE")
