"""Recipes: configurations that come with the package, each of a network's part and a data set's.

A recipe is named NETWORK/DATA. Its text is that of recipes/common.yaml, networks/NETWORK.yaml and
data/DATA.yaml, one below the other: no key stands in two of them, so the text is one YAML file.
"""

from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from srdeploy.errors import UserError
from srdeploy.validation import closest

COMMON = "common.yaml"
NETWORKS = "networks"
DATA = "data"
_END = ".yaml"


@dataclass(frozen=True)
class Recipe:
    """A configuration but for the data's folder."""

    name: str
    """NETWORK/DATA."""
    text: str
    """YAML with its comments: can be saved, changed, and given to train as --config."""

    @property
    def values(self) -> dict[str, Any]:
        """The keys that the recipe sets, as a configuration file's."""
        import yaml

        values: dict[str, Any] = yaml.safe_load(self.text)
        return values


def recipe_parts(kind: str) -> dict[str, str]:
    """Names of all parts of a kind, NETWORKS or DATA, each with the line that says what it is."""
    return {name: _text(kind, name + _END).partition("\n")[0].lstrip("# ") for name in _names(kind)}


def recipe_names() -> list[str]:
    """All recipes: every network with every data set."""
    return [f"{network}/{data}" for network in _names(NETWORKS) for data in _names(DATA)]


def open_recipe(name: str) -> Recipe:
    """The recipe NETWORK/DATA. Raises UserError naming the closest one where there is none."""
    network, slash, data = name.partition("/")
    known = {NETWORKS: _names(NETWORKS), DATA: _names(DATA)}
    example = f"{known[NETWORKS][0]}/{known[DATA][0]}"
    if not slash:
        raise UserError(
            f"recipe '{name}': a recipe is NETWORK/DATA, such as {example}; "
            "all of them: srdeploy recipes"
        )
    for kind, part in ((NETWORKS, network), (DATA, data)):
        if part not in known[kind]:
            what = "network" if kind == NETWORKS else "data set"
            raise UserError(
                f"no recipe '{name}': its {what} '{part}' is unknown: {closest(part, known[kind])}"
            )
    parts = (_text(COMMON), _text(NETWORKS, network + _END), _text(DATA, data + _END))
    return Recipe(f"{network}/{data}", "\n".join(parts))


def _names(kind: str) -> list[str]:
    """Of all parts of a kind, sorted; no file is read."""
    files_of_kind = (one.name for one in (_folder() / kind).iterdir())
    return sorted(name.removesuffix(_END) for name in files_of_kind if name.endswith(_END))


def _folder() -> Traversable:
    return files("srdeploy.train") / "recipes"


def _text(*path: str) -> str:
    return _folder().joinpath(*path).read_text(encoding="utf-8")
