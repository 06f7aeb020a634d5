"""Which steps of making pseudo masks are done, and with which settings: pseudo/progress.json."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, get_args

from srdeploy.errors import UserError
from srdeploy.files import read_json, write_json

PROGRESS = "progress.json"

Step = Literal["classify", "maps", "masks"]
STEPS: tuple[Step, ...] = get_args(Step)
"""In their order."""


def key_of(*values: Any) -> str:
    """A digest of settings; equal for equal JSON."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


class StepLog:
    """Steps by name; each has the key of what it depends on, and whether it is done."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / PROGRESS
        found: Any = read_json(self.path) if self.path.exists() else {}
        if not isinstance(found, dict):
            raise UserError(f"{self.path}: not a record of steps: remove it and run again")
        self._steps: dict[str, dict[str, Any]] = found

    def key(self, step: Step) -> str | None:
        """With what it was begun; None: it never was."""
        return self._steps.get(step, {}).get("key")

    def done(self, step: Step, key: str) -> bool:
        """Whether it is done with these settings."""
        return self._steps.get(step) == {"key": key, "done": True}

    def begin(self, step: Step, key: str) -> None:
        """It is under way; those after it are no more."""
        after = STEPS[STEPS.index(step) :]
        self._steps = {name: one for name, one in self._steps.items() if name not in after}
        self._steps[step] = {"key": key, "done": False}
        write_json(self.path, self._steps)

    def forget(self) -> None:
        """None is begun any more."""
        self._steps = {}
        write_json(self.path, self._steps)

    def finish(self, step: Step) -> None:
        """It is done."""
        self._steps[step]["done"] = True
        write_json(self.path, self._steps)
