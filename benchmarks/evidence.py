"""Does self-regulation help? Baseline and regulated runs at equal budget, seed by seed.

    python benchmarks/evidence.py ../data/camvid --pretrained mobilenet_v2.safetensors --minutes 30

For every seed, every system and every variant, one run: the same steps, start and batches, and
nothing else differs. The weights that are best on the selecting split are scored on that and on the
test split. Results are means over seeds, and differences from the baseline of the same seed, with
95 % t intervals. The same command resumes where it stopped: what is finished is kept, a run that
was cut off is resumed. Every step is a `srdeploy` command, and the commands stand in the result.
"""

import shlex
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from evidence_figures import save_curves, summarised, tables
from evidence_variants import BASELINE, VARIANTS, chosen
from journal import Journal

from srdeploy.environment import describe_environment
from srdeploy.errors import UserError
from srdeploy.files import read_json, write_json, write_whole
from srdeploy.runs import METRICS, is_run
from srdeploy.train.recorder import read_metrics

SMALL = (
    "--batch 8 --crop 160x192 --workers 1 --device cpu --set longest_side=240 "
    "--set scale=[0.5,1.5] --set channels_last=true --set val_every=100"
)
"""Flags of all runs by default: small photos, for a CPU."""


class Study:
    """The runs of one folder: FOLDER/SYSTEM/VARIANT/seed-N, and beside each its record,
    seed-N.json."""

    def __init__(self, folder: Path, data: Path, val: str, test: str) -> None:
        self.folder = folder
        self.data = data
        self.splits = {"val": val, "test": test}
        self.journal = Journal()

    def run(
        self, system: str, variant: str, seed: int, words: list[str], begin: bool
    ) -> dict[str, Any] | None:
        """Trains and scores one run, or takes what is there of it; returns its record.

        begin: whether it may be worked at; where not, and it isn't finished, None is returned.

        Raises UserError where what is there was made with other flags.
        """
        run = self.folder / system.replace("/", "-") / variant / f"seed-{seed}"
        kept = run.with_suffix(".json")
        words = [*_system(system), *words, *VARIANTS[variant], "--seed", str(seed)]
        record: dict[str, Any] = {"system": system, "variant": variant, "seed": seed}
        record |= {"words": words, "splits": self.splits, "data": self.data.resolve().name}
        if kept.exists():
            found = read_json(kept)
            for key, value in record.items():
                if found[key] != value:
                    raise UserError(
                        f"{run} was made with {key} {_shown(found[key])}, not {_shown(value)}: "
                        "give another --folder"
                    )
            if "scores" in found:
                return dict(found)
        if not begin:
            return None
        if not kept.exists():
            # First, so that a run that is cut off is known by its flags.
            run.parent.mkdir(parents=True, exist_ok=True)
            write_json(kept, record)
        resumed = is_run(run)
        began = ["train", "--resume"] if resumed else ["train", str(self.data), *words]
        trained = self.journal.run(*began, "--out", run)
        if not trained["finished"]:
            raise SystemExit(1)
        record["best_step"] = trained["best_step"]
        # Of a run in one piece alone: a resumed one tells its last piece's.
        record["train_seconds"] = None if resumed else trained["seconds"]
        record["curve"] = [
            [one["step"], one["miou"]]
            for one in read_metrics(run / METRICS)
            if one["kind"] == "val"
        ]
        record["scores"] = {
            kind: self.journal.run("evaluate", run, self.data, "--split", split)
            for kind, split in self.splits.items()
        }
        write_json(kept, record)
        return record


def _system(name: str) -> list[str]:
    return ["--recipe" if "/" in name else "--network", name]


def _shown(value: Any) -> str:
    return shlex.join(value) if isinstance(value, list) else str(value)


def main(
    data: Annotated[Path, typer.Argument(help="The data set's folder.")],
    system: Annotated[
        list[str] | None, typer.Option(help="A network, or NETWORK/DATA for a recipe; repeatable.")
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(help="A variant, or main, forms, weights, heads or schedule; repeatable."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds 0 to SEEDS - 1.", min=1)] = 3,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each run.", min=1)] = 600,
    pretrained: Annotated[Path | None, typer.Option(help="Backbone weights to start from.")] = None,
    train_words: Annotated[
        str, typer.Option("--train", help="Flags of srdeploy train for all runs.")
    ] = SMALL,
    train_split: Annotated[str, typer.Option(help="Split to train on.")] = "train",
    val_split: Annotated[str, typer.Option(help="Split that selects the weights.")] = "val",
    test_split: Annotated[str, typer.Option(help="Split that is reported.")] = "test",
    minutes: Annotated[float | None, typer.Option(help="Begin no run after so long.")] = None,
    folder: Annotated[Path, typer.Option(help="Runs and results.")] = Path("evidence"),
) -> None:
    """Train, score and compare variants; write evidence.json, evidence.md and curves."""
    if not data.is_dir():
        raise SystemExit(f"no such data set: {data}: nothing was measured")
    if not set(test_split.split("+")).isdisjoint(val_split.split("+")):
        raise SystemExit(
            f"--test-split must not be {val_split}, nor hold any of it: it selects the weights"
        )
    began = time.monotonic()
    words = [*shlex.split(train_words), "--steps", str(steps)]
    words += [] if pretrained is None else ["--pretrained", str(pretrained)]
    words += ["--set", f"train_split={train_split}", "--set", f"val_split={val_split}"]
    study = Study(folder, data, val_split, test_split)
    records = []
    try:
        variants = chosen(variant or ["main"])
        systems = system or ["deeplabv2-mobilenetv2"]
        # Seed by seed, so that whole pairs are there whenever it stops.
        plan = [(seed, one, kind) for seed in range(seeds) for one in systems for kind in variants]
        for seed, one, kind in plan:
            # What is finished counts, however late it is.
            begin = minutes is None or time.monotonic() - began < 60 * minutes
            record = study.run(one, kind, seed, words, begin)
            if record is not None:
                records.append(record)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    left = len(plan) - len(records)
    figures = {one: summarised([r for r in records if r["system"] == one]) for one in systems}
    write_json(
        folder / "evidence.json",
        {
            "environment": describe_environment(),
            "baseline": BASELINE,
            "seeds": seeds,
            "steps": steps,
            "runs_left": left,
            "commands": study.journal.commands,
            "figures": figures,
            "runs": records,
        },
    )
    text = tables(figures, steps, study.splits, left)
    write_whole(folder / "evidence.md", text)
    for one in systems:
        curves = {
            kind: [r["curve"] for r in records if (r["system"], r["variant"]) == (one, kind)]
            for kind in variants
        }
        save_curves(folder / f"curves-{one.replace('/', '-')}.png", one, curves)
    print(text)


if __name__ == "__main__":
    typer.run(main)
