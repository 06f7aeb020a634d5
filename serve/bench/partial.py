"""The cells of a benchmark that is under way, so that one that was stopped can go on."""

from pathlib import Path
from typing import Any

from srdeploy.errors import UserError
from srdeploy.files import read_json, write_json
from srdeploy.serve.bench.results import Cell
from srdeploy.validation import Settings, validated

NAME = "partial.json"
"""Beside the report; gone when that is written."""


class Partial(Settings):
    """What was asked for, and the cells measured so far, in the order of the settings."""

    request: dict[str, Any]
    """As JSON: files' hashes, settings, plan. A cell is good for the same request alone."""
    cells: tuple[Cell, ...] = ()


class PartialFile:
    """Keeps the cells in `folder`, whole after each; without a folder it keeps nothing."""

    def __init__(self, folder: Path | None, resume: bool) -> None:
        """Raises UserError where there is nothing to resume."""
        self._path = None if folder is None else folder / NAME
        self._resume = resume
        self._content = Partial(request={})
        if resume and (self._path is None or not self._path.is_file()):
            where = "--out names no folder" if folder is None else f"{folder} holds no {NAME}"
            raise UserError(f"--resume: no benchmark was stopped there ({where})")

    def begin(self, request: dict[str, Any]) -> tuple[Cell, ...]:
        """The cells that are there already. Raises UserError where they were of another request."""
        self._content = Partial(request=request)
        if self._resume:
            assert self._path is not None
            found = validated(Partial, read_json(self._path), str(self._path))
            for key, value in request.items():
                if found.request.get(key) != value:
                    raise UserError(
                        f"--resume: {self._path} was of another benchmark ({key} differs): give "
                        "the same arguments and files, or leave --resume away to begin anew"
                    )
            self._content = found
        return self._content.cells

    def add(self, cell: Cell) -> None:
        """Keeps one more."""
        self._content = self._content.model_copy(update={"cells": (*self._content.cells, cell)})
        if self._path is not None:
            write_json(self._path, self._content.model_dump(mode="json"))

    def end(self) -> None:
        """The report is written: nothing is left to resume."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
