"""`srdeploy evaluate` and `predict`: what is done with an artifact."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from srdeploy.cli.options import (
    Arithmetic,
    Classes,
    Device,
    Json,
    Quiet,
    RuntimeName,
    Split,
    Threads,
)

if TYPE_CHECKING:
    from srdeploy.serve.runtime import Runtime

Artifact = Annotated[
    Path,
    typer.Argument(
        help="A run folder, a deploy folder, an .onnx or an .engine file.", show_default=False
    ),
]


def evaluate(
    artifact: Artifact,
    data: Annotated[Path, typer.Argument(help="The data set's folder.", show_default=False)],
    split: Split = "val",
    limit: Annotated[int | None, typer.Option(help="Score the first N photos.", min=1)] = None,
    device: Device = "cpu",
    runtime: RuntimeName = "auto",
    precision: Arithmetic = None,
    threads: Threads = None,
    classes: Classes = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Score an artifact on a labelled split: IoU per class, mIoU, pixel accuracy, both failures.

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


def predict(
    artifact: Artifact,
    photos: Annotated[
        list[Path],
        typer.Argument(help="Folders (with their sub-folders) and files.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the masks.", show_default=False)],
    overlay: Annotated[
        bool, typer.Option("--overlay", help="Also write photos with the classes laid over.")
    ] = False,
    device: Device = "cpu",
    runtime: RuntimeName = "auto",
    precision: Arithmetic = None,
    threads: Threads = None,
    classes: Classes = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write a palette PNG mask of each photo's own size; pixel values are class ids.

    The mask of a/b.jpg is OUT/a/b.png; photos that differ in their suffix alone keep it
    (b.jpg.png). OUT/classes.json and OUT/legend.png say what the ids mean. Photos that can't be
    used are reported and skipped, and make the exit code 1.

    Example: srdeploy predict deploy/night photos --out masks --overlay
    """
    from srdeploy import console
    from srdeploy.serve.artifact import spec_from_classes
    from srdeploy.serve.predict import predict_photos
    from srdeploy.serve.scheduling.sessions import Source

    console.set_quiet(quiet or as_json)
    spec = spec_from_classes(classes) if classes is not None else None
    source = Source("predict", artifact, device, runtime, spec, precision)
    summary = predict_photos(source, photos, out, overlay, threads)
    if as_json:
        console.print_json(summary.model_dump(mode="json"))
    else:
        tell = console.done if summary.images else console.failed
        tell(
            f"{summary.images} masks in {out}: {summary.seconds:.1f} s, "
            f"{summary.images_per_s:.1f} images/s (decode {summary.decode_s:.1f} s, network "
            f"{summary.run_s:.1f} s, encode {summary.encode_s:.1f} s, side by side)"
        )
    if summary.skipped:
        console.failed(f"{len(summary.skipped)} photos skipped, the reasons are above")
        raise typer.Exit(1)


def _opened(
    artifact: Path,
    device: str,
    runtime: str,
    threads: int | None,
    classes: Path | None,
    precision: str | None,
) -> "Runtime":
    from srdeploy.serve.artifact import spec_from_classes
    from srdeploy.serve.runtime import open_runtime

    spec = spec_from_classes(classes) if classes is not None else None
    return open_runtime(artifact, device, runtime, spec, threads, precision)


def register(app: typer.Typer) -> None:
    """Adds the verbs to the command line."""
    app.command("evaluate")(evaluate)
    app.command("predict")(predict)
