"""Verbs of two words, beside the verb of their first word alone."""

from typing import Any

from typer.core import TyperGroup


class TwoWords(TyperGroup):
    """A group whose commands may have names of two words: `bench train` beside `bench`.

    The longer name wins. Not a group within the group: `bench` takes arguments of its own.
    """

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """(name, command, what is left of args), as typer's own."""
        both = " ".join(args[:2])
        if len(args) > 1 and both in self.commands:
            args = [both, *args[2:]]
        return super().resolve_command(ctx, args)
