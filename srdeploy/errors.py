"""The errors that people see. Everything else that is raised is a bug of ours and keeps its
traceback."""

import re
import shlex

_DISTRIBUTIONS = {
    "PIL": "pillow",
    "cuda": "cuda-python",
    "multipart": "python-multipart",
    "pynvml": "nvidia-ml-py",
    "yaml": "pyyaml",
}
"""Distributions that are not called like their module."""

_INTERNAL = ("", "all", "dev", "interop")
"""Extras that are too wide to be the remedy where another one brings the package."""


class UserError(Exception):
    """Input that can't be used: one line that says what is wrong, where, and what to do. Exit code
    2."""


class MissingPackageError(UserError):
    """An optional dependency is absent; the message ends with the pip line that installs it.

    The line names packages, not an extra of ours: it works wherever srdeploy came from.
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        packages = extra_packages(extra) or (package,)
        super().__init__(
            f"{purpose} needs {package}, which is not installed: "
            f"{shlex.join(['pip', 'install', *packages])}"
        )


def extra_packages(extra: str) -> tuple[str, ...]:
    """What pip must install for one of our extras, as the installed metadata lists it; () for an
    unknown extra, or where srdeploy runs without being installed."""
    if not extra:
        return ()
    return tuple(_without_lower_bound(one) for one in _requirements().get(extra, ()))


def missing_package(error: ModuleNotFoundError, purpose: str) -> MissingPackageError | None:
    """The error for people where `error` is about a dependency of ours; None for other modules."""
    module = (error.name or "").partition(".")[0]
    distribution = _normal(_DISTRIBUTIONS.get(module, module))
    requirements = _requirements()
    for extra in sorted(requirements, key=_INTERNAL.__contains__):
        if distribution in {_normal(_name(one)) for one in requirements[extra]}:
            narrow = "" if extra in _INTERNAL else extra
            return MissingPackageError(distribution, narrow, purpose)
    return None


def _requirements() -> dict[str, list[str]]:
    """Requirements without their markers, by extra; '' holds those of every installation."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        lines = requires("srdeploy") or []
    except PackageNotFoundError:
        return {}
    found: dict[str, list[str]] = {}
    for line in lines:
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", marker)
        found.setdefault(extra[1] if extra else "", []).append(requirement.strip())
    return found


def _without_lower_bound(requirement: str) -> str:
    """'ray[data]<2.64' from 'ray[data]<2.64,>=2.60': pip takes the newest anyway."""
    name = _name(requirement)
    extras = re.match(r"\s*(\[[^\]]*\])?", requirement[len(name) :])
    start = len(name) + (extras.end() if extras else 0)
    bounds = [part.strip() for part in requirement[start:].strip(" ()").split(",")]
    kept = [part for part in bounds if part and not part.startswith(">")]
    return f"{requirement[:start].strip()}{','.join(kept)}"


def _name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
