"""What self-regulation costs while training: what README and docs/results/step-cost.md report.

    python benchmarks/step_cost.py                      # DeepLab-v2 ResNet-101, 321x321, batch 2
    python benchmarks/step_cost.py unet --option width=8 --size 64x64 --rounds 5
    python benchmarks/step_cost.py --device cuda --batch 8 --out step-cost.json

Runs `srdeploy bench train`, keeps its figures, and prints them as a Markdown table.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from journal import Journal

from srdeploy.files import write_json


def main(
    network: Annotated[str, typer.Argument(help="A network's name.")] = "deeplabv2-resnet101",
    option: Annotated[list[str] | None, typer.Option(help="A network's option, KEY=VALUE.")] = None,
    size: Annotated[str, typer.Option(help="HEIGHTxWIDTH of the images.")] = "321x321",
    batch: Annotated[int, typer.Option(help="Images per step.")] = 2,
    classes: Annotated[int, typer.Option(help="Classes of the network.")] = 21,
    rounds: Annotated[int, typer.Option(help="Each variant steps twice in each.")] = 10,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("step-cost.json"),
) -> None:
    """Measure training steps of the baseline and three regulated variants."""
    words = ["bench", "train", network, *(f"--option={one}" for one in option or [])]
    words += ["--size", size, "--batch", str(batch), "--classes", str(classes)]
    words += ["--rounds", str(rounds), "--device", device]
    words += [] if threads is None else ["--threads", str(threads)]
    journal = Journal()
    cost = journal.run(*words)
    write_json(out, {**cost, "commands": journal.commands})
    print(table(cost))


def table(cost: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| variant | step, ms | time over baseline (95 %) | peak, MiB | memory over baseline |",
        "|---|---|---|---|---|",
    ]
    for row in cost["variants"]:
        cells = [f"{row['name']}: {row['description']}", f"{row['median_ms']:.0f}"]
        cells += [_ratio(row["time"]), f"{row['memory_mib']:.0f}", f"{row['memory_ratio']:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append(f"| the baseline again | | {_ratio(cost['floor'])} | | |")
    return "\n".join(lines)


def _ratio(interval: dict[str, float] | None) -> str:
    if interval is None:
        return "1"
    return f"{interval['value']:.3f} ({interval['low']:.3f} to {interval['high']:.3f})"


if __name__ == "__main__":
    typer.run(main)
