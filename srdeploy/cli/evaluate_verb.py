"""`srdeploy evaluate`: how good an artifact is."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from srdeploy.cli.options import (
    Arithmetic,
    Artifact,
    Classes,
    Device,
    Json,
    Quiet,
    RuntimeName,
    Split,
    Threads,
)
from srdeploy.cli.verbs import USE, add_verb

if TYPE_CHECKING:
    from srdeploy.runtimes.base import Runtime


def evaluate(
    artifact: Artifact,
    data: Annotated[Path, typer.Argument(help="The data set's folder.", show_default=False)],
    split: Split = "val",
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Score the first N photos.", min=1)
    ] = None,
    device: Device = "cpu",
    runtime: RuntimeName = "auto",
    precision: Arithmetic = None,
    threads: Threads = None,
    classes: Classes = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Score an artifact on a labelled split: IoU per class, mIoU, pixel accuracy, error hints.

    Labels are compared at the masks' own size.

    Example: srdeploy evaluate deploy/night data/camvid --split test
    """
    from srdeploy import console
    from srdeploy.data import open_dataset
    from srdeploy.serve.evaluate import evaluate as score

    console.set_quiet(quiet or as_json)
    dataset = open_dataset(data, split)
    with _opened(artifact, device, runtime, threads, classes, precision) as opened:
        scores = score(opened, dataset, limit)
        description = str(opened)
    if as_json:
        console.print_json(
            {
                "artifact": str(artifact),
                "backend": opened.backend,
                "device": opened.device,
                "precision": opened.precision,
                "data": str(data),
                "split": split,
                **scores.model_dump(mode="json"),
            }
        )
    else:
        console.print_table(scores.table(f"{description} on {data}, {split}"))
        console.say(f"mIoU {100 * scores.miou:.2f} %")


def _opened(
    artifact: Path,
    device: str,
    runtime: str,
    threads: int | None,
    classes: Path | None,
    precision: str | None,
) -> "Runtime":
    from srdeploy.artifacts.artifact import spec_from_classes
    from srdeploy.runtimes.registry import open_runtime

    spec = spec_from_classes(classes) if classes is not None else None
    return open_runtime(artifact, device, runtime, spec, threads, precision)


def register(app: typer.Typer) -> None:
    """Adds the verb to the command line."""
    add_verb(app, "evaluate", evaluate, USE)
