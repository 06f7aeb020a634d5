"""What self-regulation costs while training: what README and docs/results/step-cost.md report.

    python benchmarks/step_cost.py                      # every system, 128x128, batch 2
    python benchmarks/step_cost.py deeplabv2-resnet50 --size 321x321 --rounds 10
    python benchmarks/step_cost.py deeplabv2-resnet101 --size 321x321 --device cuda --batch 8

Runs `srdeploy bench train` for each network, keeps its figures, and prints them as a Markdown
table. A network that is in the output file already is left as it is, so a run that was stopped goes
on.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from journal import Journal
from verdicts import SYSTEMS

from srdeploy.files import read_json, write_json


def main(
    networks: Annotated[
        list[str] | None, typer.Argument(help="Networks' names; one of every system by default.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="An option of all networks, KEY=VALUE.")
    ] = None,
    size: Annotated[str, typer.Option(help="HEIGHTxWIDTH of the images.")] = "128x128",
    batch: Annotated[int, typer.Option(help="Images per step.")] = 2,
    classes: Annotated[int, typer.Option(help="Classes of the network.")] = 21,
    rounds: Annotated[int, typer.Option(help="Each variant steps twice in each.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    compile_steps: Annotated[
        bool, typer.Option("--compile", help="Through torch.compile, the baseline too.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("step-cost.json"),
) -> None:
    """Measure training steps of the baseline and three regulated variants."""
    words = [f"--option={one}" for one in option or []]
    words += ["--size", size, "--batch", str(batch), "--classes", str(classes)]
    words += ["--rounds", str(rounds), "--device", device]
    words += [] if threads is None else ["--threads", str(threads)]
    words += ["--compile"] if compile_steps else []
    costs: dict[str, Any] = read_json(out) if out.exists() else {}
    for network in networks or SYSTEMS:
        if network in costs:
            continue
        journal = Journal()
        cost = journal.run("bench", "train", network, *words)
        costs[network] = {**cost, "commands": journal.commands}
        write_json(out, costs)
    print(table(costs))


def table(costs: dict[str, dict[str, Any]]) -> str:
    """The figures as a Markdown table: a row for every network, ratios to its baseline."""
    lines = [
        "| network | baseline, ms | against itself | MEA, time | lean, time | lean, memory | "
        "authors, time | authors, memory |",
        "|---" * 8 + "|",
    ]
    for network, cost in costs.items():
        by_name = {row["name"]: row for row in cost["variants"]}
        mea, lean, authors = (by_name[name] for name in ("mea", "lean", "authors"))
        cells = [network, f"{by_name['baseline']['median_ms']:.0f}", _ratio(cost["floor"])]
        cells += [_ratio(mea["time"])]
        for row in (lean, authors):
            cells += [_ratio(row["time"]), f"{row['memory_ratio']:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ratio(interval: dict[str, float]) -> str:
    return f"{interval['value']:.3f} ({interval['low']:.3f} to {interval['high']:.3f})"


if __name__ == "__main__":
    typer.run(main)
