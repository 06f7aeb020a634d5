"""pydantic models whose errors people can act on: the key, the value, what was expected, the
closest name."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from srdeploy.errors import UserError

Model = TypeVar("Model", bound=BaseModel)


class Settings(BaseModel):
    """Base of every configuration model: frozen, unknown keys refused, defaults checked too."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def closest(name: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for the nearest of `known`, else the list of them; to end a message
    with."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"


def parse_size(text: str, where: str) -> tuple[int, int]:
    """(height, width) in pixels from "360x480". Raises UserError naming `where`, e.g. --size."""
    parts = [part.strip() for part in text.lower().split("x")]
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"{where} '{text}': height x width in pixels is needed, e.g. 360x480")
    return int(parts[0]), int(parts[1])


def validated(model: type[Model], values: Mapping[str, Any], where: str) -> Model:
    """Makes `model` from `values`. Raises UserError of one line that names `where` and the first
    fault."""
    if not isinstance(values, Mapping):
        kind = type(values).__name__
        raise UserError(f"{where}: a mapping of keys to values is needed, this is a {kind}")
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            known = _fields_at(model, fault["loc"][:-1])
            message = f"unknown key '{key}': {closest(str(fault['loc'][-1]), known)}"
        elif fault["type"] == "missing":
            message = f"'{key}' is missing"
        else:
            reason = fault["msg"].removeprefix("Value error, ")
            reason = reason[0].lower() + reason[1:]
            shown = (
                "" if isinstance(fault["input"], Mapping) else f" is {str(fault['input'])[:80]!r}"
            )
            message = f"'{key}'{shown}: {reason}" if key else reason
        raise UserError(f"{where}: {message}") from error


def setting_flags(values: Mapping[str, Any]) -> list[str]:
    """["--set", "KEY=VALUE", ...] that parse_options reads as `values`."""
    import json

    import yaml

    flags: list[str] = []
    for key, value in values.items():
        plain = isinstance(value, str) and yaml.safe_load(value) == value
        flags += ["--set", f"{key}={value if plain else json.dumps(value)}"]
    return flags


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Field names of the model nested at `location` below `model`."""
    current = model
    for part in location:
        field = current.model_fields.get(str(part))
        if field is None:
            break
        candidates = [field.annotation, *get_args(field.annotation)]
        nested = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not nested:
            break
        current = nested[0]
    return list(current.model_fields)


def parse_options(
    texts: Sequence[str], flag: str = "--option", example: str = "output_stride=8"
) -> dict[str, Any]:
    """["width=8"] as {"width": 8}; values are read as YAML. Raises UserError naming `flag`."""
    import yaml

    options: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key.isidentifier():
            raise UserError(f"{flag} {text}: needs KEY=VALUE, such as {flag} {example}")
        if key in options:
            raise UserError(f"{flag} {key} is given twice")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"{flag} {text}: the value is not valid YAML") from error
    return options
