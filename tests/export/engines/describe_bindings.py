"""Prints, as JSON, what a TensorRT package offers: its classes, their attributes and signatures.

Run as a program, with the package's name, where the package can be imported.
"""

import importlib
import inspect
import json
import sys
from typing import Any


def describe(package: Any) -> dict[str, Any]:
    """Module attributes: None, or for classes attribute -> its kind and signature text."""
    found: dict[str, Any] = {}
    for name in dir(package):
        value = getattr(package, name)
        found[name] = describe_class(value) if inspect.isclass(value) else None
    return found


def describe_class(kind: type) -> dict[str, Any]:
    """Attribute -> {"member": of an enumeration?, "text": signatures, or a property's type}."""
    members = getattr(kind, "__members__", {})
    found = {}
    for name in dir(kind):
        value = inspect.getattr_static(kind, name)
        getter = value.fget if isinstance(value, property) else None
        text = getattr(getter if getter is not None else getattr(kind, name), "__doc__", None)
        found[name] = {
            "member": name in members,
            "property": isinstance(value, property),
            "text": text if isinstance(text, str) else "",
        }
    return found


if __name__ == "__main__":
    package = importlib.import_module(sys.argv[1])
    print(json.dumps({"version": package.__version__, "names": describe(package)}))
