"""The main job on CamVid, on the CPU: what README and docs/results/camvid-cpu.md report.

    python benchmarks/camvid.py ../data/camvid --pretrained mobilenet_v2.safetensors

Trains DeepLab-v2 on MobileNetV2 twice, equal but for self-regulation, exports and certifies both,
scores checkpoints and files on val, and benchmarks the files against each other on test. Runs that
are there are resumed or kept; exports are made anew. Every step is a `srdeploy` command, and the
commands stand in the result.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from journal import Journal, without_runs

from srdeploy.environment import describe_environment
from srdeploy.files import write_json

KINDS = {"baseline": "--no-sr", "regulated": "--sr"}


def train(journal: Journal, kind: str, data: Path, pretrained: Path, steps: int, run: Path) -> None:
    """Trains one run, or resumes it."""
    if (run / "state.pt").exists():
        journal.run("train", "--out", run, "--resume")
        return
    settings = "--batch 8 --crop 192x256 --workers 1 --set scale=[0.5,1.5] --set channels_last=true"
    journal.run(
        *("train", str(data), "--network", "deeplabv2-mobilenetv2"),
        *("--pretrained", str(pretrained), "--steps", str(steps), *settings.split()),
        *(KINDS[kind], "--out", str(run)),
    )


def main(
    data: Annotated[Path, typer.Argument(help="CamVid in the folder layout.")],
    pretrained: Annotated[Path, typer.Option(help="MobileNetV2's weights.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps of each run.")] = 600,
    budget: Annotated[float, typer.Option(help="Seconds of the latency comparison.")] = 150,
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs"),
    deploy: Annotated[Path, typer.Option(help="Folder of the exports.")] = Path("deploy"),
    report: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("bench"),
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("camvid.json"),
) -> None:
    """Train, export, certify, evaluate and bench on CamVid."""
    if not data.is_dir():
        raise SystemExit(f"no such data set: {data}: nothing was measured")
    journal = Journal()
    names = {kind: f"camvid-{kind}" for kind in KINDS}
    for kind, name in names.items():
        train(journal, kind, data, pretrained, steps, runs / name)
    certificates = {
        kind: journal.run("export", runs / name, "--out", deploy / name, "--force")["certificate"]
        for kind, name in names.items()
    }
    files = [deploy / name for name in names.values()]
    same_graph = journal.run("certify", *files)
    val: dict[str, Any] = {
        kind: {
            place: journal.run("evaluate", folder / name, data, "--split", "val")
            for place, folder in (("torch", runs), ("onnx", deploy))
        }
        for kind, name in names.items()
    }
    words = ["bench", *map(str, files), "--data", str(data), "--split", "test"]
    for name in names.values():
        words += ["--checkpoint", str(runs / name)]
    test = journal.run(*words, "--budget", str(budget), "--out", str(report))
    write_json(
        out,
        {
            "environment": describe_environment(),
            "commands": journal.commands,
            "certificates": certificates,
            "same_graph": same_graph,
            "val": val,
            "test": without_runs(test),
        },
    )


if __name__ == "__main__":
    typer.run(main)
