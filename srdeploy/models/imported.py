"""Networks from a user's own code, named "package.module:function", used like built-in ones.

Building such a network imports and runs that code, with the working folder first on Python's path
as `python -m` has it. So does opening a run whose config.yaml names code: open runs of people you
trust, as you would run their scripts. An exported ONNX file never imports anything.
"""

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from srdeploy.errors import UserError
from srdeploy.models.weights import differences
from srdeploy.validation import closest

CLASS_COUNT_NAMES = ("classes", "num_classes", "n_classes", "num_labels", "nclass")
"""Names under which functions take the number of classes."""

_USAGE = "give PACKAGE.MODULE:FUNCTION, such as my_package.models:make_network"


def is_imported(name: str) -> bool:
    """True if a network's name has the form "package.module:function"."""
    return ":" in name


def imported_network(name: str, classes: int, options: Mapping[str, Any]) -> nn.Module:
    """Calls the function or nn.Module class `name` ("package.module:function") for a network.

    It gets the number of classes under one of CLASS_COUNT_NAMES (`classes` where it takes any
    keyword and names none), else as its first positional parameter where that has no default and is
    not annotated as anything but an int, else not at all. `options` go by keyword. Raises UserError
    of one line: the module or the function is not there, importing or calling it raised, an option
    is unknown or missing, or what came back is no nn.Module.
    """
    with working_folder_first():
        builder = _find(name)
        arguments, keywords = _arguments(name, builder, classes, options)
        try:
            network = builder(*arguments, **keywords)
        except (Exception, SystemExit) as error:
            raise UserError(f"network '{name}': calling it raised {_told(error)}") from error
    if not isinstance(network, nn.Module):
        raise UserError(
            f"network '{name}' returned a {type(network).__name__}: a torch.nn.Module is needed"
        )
    return network


def require_alike(name: str, first: nn.Module, second: nn.Module) -> None:
    """Raises UserError where two networks made by `name` share weights, or have other ones in
    kind: then nothing can be compared with a fresh network."""
    shared = {id(parameter) for parameter in first.parameters()}
    if first is second or any(id(parameter) in shared for parameter in second.parameters()):
        raise UserError(
            f"network '{name}': two calls gave the same weights in memory: it must make a new "
            "network at each call"
        )
    faults = differences(first.state_dict(), second.state_dict())
    if faults:
        raise UserError(f"network '{name}': two calls gave different networks: {faults}")


@contextmanager
def working_folder_first() -> Iterator[None]:
    """Python looks for modules in the working folder first, inside the block."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if folder in sys.path:  # the imported code may have changed it
            sys.path.remove(folder)


def _find(name: str) -> Callable[..., Any]:
    """The function or class that `name` refers to."""
    path, _, attribute = name.partition(":")
    if path.endswith(".py") or "/" in path or "\\" in path:
        dotted = ".".join(Path(path.replace("\\", "/")).with_suffix("").parts).strip("./")
        raise UserError(
            f"network '{name}': a module's dotted name is needed, not a file: "
            f"{dotted}:{attribute or 'FUNCTION'}"
        )
    if not all(part.isidentifier() for part in (*path.split("."), *attribute.split("."))):
        raise UserError(f"network '{name}': {_USAGE}")
    found: Any = _import(name, path)
    for part in attribute.split("."):
        if not hasattr(found, part):
            known = [key for key in vars(found) if _is_offered(key, getattr(found, key), path)]
            hint = closest(part, known) if known else "it defines no functions or classes"
            raise UserError(f"network '{name}': {path} has no '{attribute}': {hint}")
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        raise UserError(
            f"network '{name}' is a network, not a function that makes one: the certificate "
            "compares with a second one, built fresh; name its class, or wrap it in a function"
        )
    if not callable(found):
        raise UserError(
            f"network '{name}' is a {type(found).__name__}: name a function that makes the "
            "network, or its class"
        )
    return found  # type: ignore[no-any-return]


def _import(name: str, path: str) -> ModuleType:
    try:
        # What a module draws while it is imported, once in a process, must not shift the weights.
        with torch.random.fork_rng(devices=[]):
            return importlib.import_module(path)
    except ModuleNotFoundError as error:
        absent = error.name or ""
        if path == absent or path.startswith(absent + "."):
            raise UserError(
                f"network '{name}': there is no module '{absent}' in {Path.cwd()}, nor installed: "
                "run this in the folder that holds it, or name that folder in PYTHONPATH"
            ) from error
        raise UserError(f"network '{name}': importing {path} raised {_told(error)}") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"network '{name}': importing {path} raised {_told(error)}") from error


def _arguments(
    name: str, builder: Callable[..., Any], classes: int, options: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments for `builder`."""
    try:
        parameters = inspect.signature(builder).parameters
    except (TypeError, ValueError) as error:
        raise UserError(
            f"network '{name}': Python can't tell its parameters: wrap it in a function"
        ) from error
    count = _class_count_parameter(parameters, options)
    positional = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_ONLY]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = [
        p.name
        for p in parameters.values()
        if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name != count
    ]
    for option in options:
        if option == count:
            raise UserError(
                f"network '{name}': option '{option}' is the number of classes, which comes from "
                "the class list: leave it away"
            )
        if option not in known and (not takes_all or option in positional):
            hint = closest(option, known) if known else "it takes none"
            raise UserError(f"network '{name}' has no option '{option}': {hint}")
    missing = [
        p.name
        for p in parameters.values()
        if p.default is p.empty
        and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        and p.name != count
        and p.name not in options
    ]
    if missing:
        raise UserError(
            f"network '{name}' needs a value for '{missing[0]}': --option {missing[0]}=VALUE"
        )
    if count is None:
        return [], dict(options)
    if count in positional:
        return [classes], dict(options)
    return [], {count: classes, **options}


def _class_count_parameter(
    parameters: Mapping[str, inspect.Parameter], options: Mapping[str, Any]
) -> str | None:
    """Name of the parameter that takes the number of classes; None where none does."""
    for name in CLASS_COUNT_NAMES:
        if name in parameters and parameters[name].kind not in (
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.VAR_KEYWORD,
        ):
            return name
    first = next(iter(parameters.values()), None)
    if first is not None and first.kind is first.VAR_KEYWORD:
        return CLASS_COUNT_NAMES[0]
    if (
        first is not None
        and first.kind in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD)
        and first.default is first.empty
        and first.annotation in (first.empty, int, "int")
        and first.name not in options
    ):
        return first.name
    return None


def _is_offered(key: str, value: Any, path: str) -> bool:
    """Whether a module's `value` may be what was meant: callable, public, and its own."""
    return callable(value) and not key.startswith("_") and getattr(value, "__module__", "") == path


def _told(error: BaseException) -> str:
    """Type, first line, and the place in the code where it was raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError) or not frames:
        return text  # its own text names file and line
    last = next((frame for frame in reversed(frames) if "importlib" not in frame.filename), None)
    if last is None or last.filename == __file__:
        return text
    return f"{text} ({Path(last.filename).name}, line {last.lineno})"
