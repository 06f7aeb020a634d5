"""Training that is killed again and again: does it always go on, and end as if nothing had been?

    python benchmarks/train_kills.py scenes --kills 100 --out kills.json

A small run is trained undisturbed. Then one of the same configuration is killed with SIGKILL at
random points, resumed each time, and compared: equal weights to the last bit, equal records. The
points: any moment, the middle of a checkpoint's bytes, just before and just after a file appears.
Each process is forked from this one, which imports torch but never computes. It runs on the
CPU only.
"""

import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from srdeploy import console, files
from srdeploy.files import write_json
from srdeploy.runs import EXITS, METRICS, STATE, WEIGHTS, is_run
from srdeploy.train import checkpoint
from srdeploy.train.config import TrainConfig, load_config
from srdeploy.train.loop import train
from srdeploy.train.recorder import read_metrics

WAYS = ("any moment", "half a checkpoint", "before a file appears", "after a file appeared")
SMALL = {
    "network": {"name": "unet", "options": {"width": 4}},
    "regulation": {"width": 8},
    "batch": 2,
    "crop": "32x40",
    "lr": 0.05,
    "log_every": 3,
    "val_every": 6,
    "save_every": 2,
    "workers": 1,
    "device": "cpu",
    "clip": 5.0,
    "ema": 0.9,
}


class Kill:
    """One kill of this process, armed in a fresh child."""

    def __init__(self, way: str, chance: random.Random, seconds: float) -> None:
        """seconds: what an undisturbed run takes."""
        self.way = way
        self.after = chance.uniform(0, seconds / 2)
        self.file = chance.randint(1, 12)
        """Which of the files that the child writes, from 1 on."""
        self.share = chance.random()
        """Of the checkpoint's bytes that are written."""
        self._files = 0
        self._replace = os.replace
        self._save = torch.save

    def arm(self) -> None:
        """Sets the trap."""
        if self.way == "any moment":
            threading.Timer(self.after, die).start()
        elif self.way == "half a checkpoint":
            checkpoint.torch.save = self._save_half  # type: ignore[attr-defined]
        else:
            files.os.replace = self._replace_and_die  # type: ignore[attr-defined]

    def _save_half(self, state: Any, path: Path) -> None:
        self._save(state, path)
        self._files += 1
        if self._files >= (self.file + 1) // 2:
            os.truncate(path, int(self.share * path.stat().st_size))
            die()

    def _replace_and_die(self, source: Path, target: Path) -> None:
        self._files += 1
        if self._files < self.file:
            self._replace(source, target)
            return
        if self.way == "after a file appeared":
            self._replace(source, target)
        die()


def die() -> None:
    """As `kill -9` from outside."""
    os.kill(os.getpid(), signal.SIGKILL)


def attempt(config: TrainConfig, folder: Path, kill: Kill | None) -> int:
    """Trains in a child, from where the folder is; the child's exit status, negative for a
    signal."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        torch.set_num_threads(1)
        console.set_quiet(True)
        if kill is not None:
            kill.arm()
        train(config, folder, resume=is_run(folder))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def step_of(folder: Path) -> int:
    """The step of the present checkpoint; 0 for none. Every one must be whole."""
    path = folder / STATE
    return int(checkpoint.read_state(path)["step"]) if path.exists() else 0


def records(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what the clock decides."""
    return [{**record, "images_per_s": 0} for record in read_metrics(folder / METRICS)]


def main(
    data: Annotated[Path, typer.Argument(help="Data set to train on.")],
    kills: Annotated[int, typer.Option(help="How often the run is killed.")] = 10,
    steps: Annotated[int, typer.Option(help="Of the run.")] = 60,
    seed: Annotated[int, typer.Option(help="Of the points at which it is killed.")] = 0,
    out: Annotated[Path, typer.Option(help="Where the report goes.")] = Path("train-kills.json"),
) -> None:
    """Kill and resume a run at random points, and compare it with an undisturbed one."""
    config = load_config({**SMALL, "data": data, "steps": steps})
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        whole, killed = Path(place) / "whole", Path(place) / "killed"
        began = time.perf_counter()
        if attempt(config, whole, None) != 0:
            raise typer.Exit(2)
        seconds = time.perf_counter() - began
        log = []
        for number in range(kills):
            kill = Kill(WAYS[number % len(WAYS)], chance, seconds)
            status = attempt(config, killed, kill)
            log.append({"way": kill.way, "status": status, "step": step_of(killed)})
            if status == 1:
                break
        last = attempt(config, killed, None)
        same = last == 0 and all(
            (whole / name).read_bytes() == (killed / name).read_bytes() for name in (WEIGHTS, EXITS)
        )
        report = {
            "kills": log,
            "finished": last == 0,
            "same_weights": same,
            "same_records": last == 0 and records(whole) == records(killed),
            "left_over": sorted(path.name for path in killed.rglob("*.part*")),
        }
    write_json(out, report)
    console.print_json(report)
    if not (report["same_weights"] and report["same_records"]):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
