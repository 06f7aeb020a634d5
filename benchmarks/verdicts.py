"""Certificate and latency verdict of every system at full width, baseline against regulated.

    python benchmarks/verdicts.py --out verdicts.json
    python benchmarks/verdicts.py segnet unet

Each network is trained for a few steps on synthetic scenes, without and with self-regulation; both
runs are exported and certified, the two files are certified against each other and then
benchmarked. The weights hardly matter to any of this. A network that is in the output file already
is left as it is, so a run that was stopped resumes.
"""

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from journal import Journal, without_runs

from srdeploy.data.synth import synthesise
from srdeploy.environment import describe_environment
from srdeploy.files import read_json, write_json

SYSTEMS = (
    "deeplabv2-resnet101",
    "segnet",
    "unet",
    "hrnet-w18",
    "ocrnet-hrnet-w18",
    "spgnet-resnet50",
    "hourglass",
)


def examine(
    journal: Journal, network: str, steps: int, folder: Path, words: list[str]
) -> dict[str, Any]:
    """Certificates and benchmark of one network."""
    data = folder / "scenes"
    synthesise(data, train=8, val=4, test=1)
    certificates = {}
    for kind, flag in (("baseline", "--no-sr"), ("regulated", "--sr")):
        journal.run(
            *("train", str(data), "--network", network, flag, "--out", folder / "runs" / kind),
            *("--steps", str(steps), "--batch", "2", "--crop", "64x64", "--set", "val_limit=1"),
        )
        exported = journal.run("export", folder / "runs" / kind, "--out", folder / kind)
        certificates[kind] = exported["certificate"]
    same_graph = journal.run("certify", folder / "baseline", folder / "regulated")
    for kind in certificates:
        words = [*words, "--checkpoint", str(folder / "runs" / kind)]
    report = journal.run("bench", folder / "baseline", folder / "regulated", *words)
    return {
        "certificates": {
            kind: {
                "passed": one["passed"],
                "lines": {line["name"]: line["detail"] for line in one["lines"]},
            }
            for kind, one in certificates.items()
        },
        "same_graph": same_graph["passed"],
        "bench": without_runs(report),
    }


def main(
    networks: Annotated[
        list[str] | None, typer.Argument(help="Names of networks; one per system by default.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps before the export.")] = 2,
    size: Annotated[str, typer.Option(help="HEIGHTxWIDTH of the benchmark.")] = "120x160",
    budget: Annotated[float, typer.Option(help="Seconds of each benchmark.")] = 120,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("verdicts.json"),
) -> None:
    """Train, export, certify and benchmark each network against its baseline."""
    found: dict[str, Any] = read_json(out)["networks"] if out.exists() else {}
    words = ["--size", size, "--budget", str(budget), "--no-costs"]
    for network in networks or SYSTEMS:
        if network in found:
            continue
        journal = Journal()
        with tempfile.TemporaryDirectory(prefix="srdeploy-") as name:
            found[network] = examine(journal, network, steps, Path(name), words)
        found[network]["commands"] = journal.commands
        write_json(out, {"environment": describe_environment(), "networks": found})
    print(table(found))


def table(found: dict[str, Any]) -> str:
    """Markdown: certificates and verdicts, network by network."""
    lines = [
        "| network | certificates | one graph | latency | ratio [95 %] | margin | floor [95 %] | "
        "exits left in |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for network, one in found.items():
        (cell,) = one["bench"]["cells"]
        rows = {row["name"]: row["end_to_end"] for row in cell["rows"]}
        verdict = rows["regulated"]["verdict"]
        passed = all(certificate["passed"] for certificate in one["certificates"].values())
        left_in = rows.get("exits left in")
        cells = (
            network,
            "both pass" if passed else "FAIL",
            "yes" if one["same_graph"] else "NO",
            verdict["outcome"],
            ratio(rows["regulated"]["ratio"]),
            f"{100 * verdict['margin']:.2f} %",
            ratio(cell["floor"]),
            "" if left_in is None else ratio(left_in["ratio"]),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ratio(interval: dict[str, float]) -> str:
    """An estimate with its interval."""
    return f"{interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


if __name__ == "__main__":
    typer.run(main)
