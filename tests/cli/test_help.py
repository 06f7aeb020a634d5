"""Help that teaches: it fits 80 columns whole, with an example for each verb."""

from collections.abc import Iterator

import pytest
import typer
from typer.testing import CliRunner

from srdeploy.cli.main import app
from srdeploy.cli.verbs import MOVED

MOST_PARAMETERS = {"export": 20, "predict": 18, "serve": 14}


def verbs() -> Iterator[tuple[str, ...]]:
    """Every verb's words, and those of the root and of groups."""
    root = typer.main.get_command(app)
    yield ()
    for name, command in getattr(root, "commands").items():  # noqa: B009
        yield tuple(name.split())
        for below in getattr(command, "commands", {}):
            yield (name, below)


@pytest.mark.wheel
@pytest.mark.parametrize("verb", list(verbs()), ids=lambda words: " ".join(words) or "srdeploy")
def test_help_fits_80_columns_uncut_and_shows_an_example(verb: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*verb, "--help"], env={"COLUMNS": "80"})
    assert result.exit_code == 0
    assert max(map(len, result.output.splitlines())) <= 80
    assert "…" not in result.output
    assert "Example: " in result.output
    assert f"srdeploy {' '.join(verb)}".rstrip() in " ".join(result.output.split())


@pytest.mark.wheel
def test_sub_commands_are_listed_where_people_look_for_them() -> None:
    listed = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}).output
    assert "bench train" in listed
    under = CliRunner().invoke(app, ["bench", "--help"], env={"COLUMNS": "80"}).output
    assert "sub-command: srdeploy bench train" in " ".join(under.split())


@pytest.mark.parametrize(("verb", "most"), list(MOST_PARAMETERS.items()))
def test_what_nobody_sets_on_a_command_line_is_no_option(verb: str, most: int) -> None:
    command = getattr(typer.main.get_command(app), "commands")[verb]  # noqa: B009
    assert len([param for param in command.params if param.name != "help"]) <= most


@pytest.mark.parametrize("verb", ["train", "bench", "export", "predict"])
def test_the_options_of_a_verb_with_many_are_grouped(verb: str) -> None:
    command = getattr(typer.main.get_command(app), "commands")[verb]  # noqa: B009
    panels = {getattr(param, "rich_help_panel", None) for param in command.params}
    assert len(panels) > 3


@pytest.mark.parametrize("verb", list(MOVED))
def test_help_names_every_setting_that_is_no_option(verb: str) -> None:
    shown = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "80"}).output
    for key in MOVED[verb]:
        assert key in shown
