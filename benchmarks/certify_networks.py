"""Certificates of every built-in network at full width, each regulated for a few steps first.

    python benchmarks/certify_networks.py ../data/camvid --out certificates.json

Shows that stripping and identity hold for each architecture, and how long an export takes.
"""

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from journal import Journal

from srdeploy.environment import describe_environment
from srdeploy.files import write_json
from srdeploy.models import NETWORKS


def main(
    data: Annotated[Path, typer.Argument(help="A data set in any of the layouts.")],
    networks: Annotated[
        list[str] | None, typer.Argument(help="Names of networks; all by default.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Regulated training steps before the export.")] = 2,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("certificates.json"),
) -> None:
    """Train each network for a few regulated steps, export it, and keep its certificate."""
    journal = Journal()
    certificates: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="srdeploy-") as name:
        folder = Path(name)
        for network in networks or NETWORKS:
            run = folder / "runs" / network
            journal.run(
                *("train", str(data), "--network", network, "--out", str(run), "--batch", "2"),
                *("--steps", str(steps), "--crop", "64x64", "--set", "val_limit=1"),
            )
            exported = journal.run("export", run, "--out", folder / "deploy" / network)
            certificate = exported["certificate"]
            certificates[network] = {
                "passed": certificate["passed"],
                "lines": {line["name"]: line["detail"] for line in certificate["lines"]},
                "seconds": journal.commands[-1]["seconds"],
            }
    write_json(out, {"environment": describe_environment(), "certificates": certificates})


if __name__ == "__main__":
    typer.run(main)
