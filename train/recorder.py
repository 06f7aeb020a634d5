"""What a run writes down: metrics.jsonl, one record per line, and TensorBoard's events where it is
installed."""

import json
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from torch import Tensor

from srdeploy.errors import UserError
from srdeploy.files import explain_os_error, read_text, write_whole
from srdeploy.metrics import Scores
from srdeploy.runs import METRICS
from srdeploy.train.distributed import World

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

TENSORBOARD = "tensorboard"
"""Folder of TensorBoard's event files inside the run."""


class Recorder:
    """Appends records to metrics.jsonl; must be open before use. Steps count finished steps, from
    1.

    {"kind": "train", "step", "lr", "loss", "terms": {name: value}, "images_per_s"} and, where
    gradients are clipped, "gradient_norm" (before clipping): losses and norms are means over the
    steps since the last record; {"kind": "val", "step", "miou", "pixel_accuracy",
    "iou": {class: value}, "failure1", "failure2"}: shares, 0..1, null where undefined.
    With `writes` False nothing is written: another process of the run does it.
    """

    def __init__(self, folder: Path, resumed_at: int = 0, writes: bool = True) -> None:
        self.path = folder / METRICS
        self._events = folder / TENSORBOARD
        self._resumed_at = resumed_at
        self._writes = writes
        self._file: TextIO | None = None
        self._board: SummaryWriter | None = None

    def __enter__(self) -> Self:
        if not self._writes:
            return self
        cut_back(self.path, self._resumed_at)
        try:
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise explain_os_error(error, self.path) from error
        if find_spec("tensorboard") is not None:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._board = SummaryWriter(str(self._events), purge_step=self._resumed_at + 1)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def train(
        self,
        step: int,
        lr: float,
        loss: float,
        terms: Mapping[str, float],
        images_per_s: float,
        gradient_norm: float | None = None,
    ) -> None:
        """One record of the losses."""
        record = {
            "kind": "train",
            "step": step,
            "lr": lr,
            "loss": loss,
            "terms": dict(terms),
            "images_per_s": round(images_per_s, 3),
        }
        figures = {"train/loss": loss, "train/lr": lr, "train/images_per_s": images_per_s}
        if gradient_norm is not None:
            record["gradient_norm"] = figures["train/gradient_norm"] = gradient_norm
        self._write(record)
        self._plot(step, figures)
        self._plot(step, {f"train/{name}": value for name, value in terms.items()})

    def val(self, step: int, scores: Scores) -> None:
        """One record of a validation."""
        figures = {
            "miou": scores.miou,
            "pixel_accuracy": scores.pixel_accuracy,
            "failure1": scores.failure1,
            "failure2": scores.failure2,
        }
        self._write({"kind": "val", "step": step, **figures, "iou": dict(scores.iou)})
        self._plot(step, {f"val/{name}": v for name, v in figures.items() if v is not None})
        self._plot(step, {f"iou/{name}": v for name, v in scores.iou.items() if v is not None})

    def _write(self, record: dict[str, Any]) -> None:
        if not self._writes:
            return
        assert self._file is not None, "open the recorder before use"
        # In one write with its newline, and out of our buffers: a killed run leaves whole lines.
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def _plot(self, step: int, values: Mapping[str, float]) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)


def cut_back(path: Path, step: int) -> None:
    """Drops the records after `step`, and a last line that was cut off while it was written."""
    if not path.exists():
        return
    kept = [record for record in read_metrics(path, torn=True) if record["step"] <= step]
    write_whole(path, "".join(json.dumps(record) + "\n" for record in kept))


def read_metrics(path: Path, torn: bool = False) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, oldest first. With `torn`, a broken last line is left out.

    Raises UserError naming the line where one is no record.
    """
    lines = read_text(path).splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if torn and number == len(lines):
                break
            raise UserError(f"{path}: line {number} is not JSON ({error.msg})") from error
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise UserError(f"{path}: line {number} is not a record with a step")
        records.append(record)
    return records


# Sums of loss terms between two records


class RunningMeans:
    """Sums of the loss terms since the last record; they stay on the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._began = time.perf_counter()
        self._steps = 0

    def add(self, terms: dict[str, Tensor]) -> None:
        """One more step's terms."""
        self._steps += 1
        for name, term in terms.items():
            self._sums[name] = self._sums[name] + term if name in self._sums else term
            self._counts[name] = self._counts.get(name, 0) + 1

    def means(self, world: World) -> dict[str, float]:
        """Mean of every term over the steps in which it was there; the processes' parts add up."""
        rows = world.gather([float(total) for total in self._sums.values()])
        totals = [sum(parts) for parts in zip(*rows, strict=True)]
        return {
            name: total / self._counts[name] for name, total in zip(self._sums, totals, strict=True)
        }

    def rate(self) -> float:
        """Steps per second."""
        return self._steps / max(time.perf_counter() - self._began, 1e-9)
