"""The errors that people see. Everything else that is raised is a bug of ours and keeps its
traceback."""


class UserError(Exception):
    """Input that can't be used: one line saying what was wrong, where, and what to do. Exit code
    2."""


class MissingPackageError(UserError):
    """An optional dependency is absent; the message ends with the pip line that installs it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs {package}, which is not installed: pip install 'srdeploy[{extra}]'"
        )
