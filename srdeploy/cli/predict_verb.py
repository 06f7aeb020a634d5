"""`srdeploy predict`: masks and more for folders of photos."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from srdeploy.cli.options import Arithmetic, Artifact, Classes, Device, Json, Quiet, RuntimeName

if TYPE_CHECKING:
    from srdeploy.serve.folders.predict import Executor
    from srdeploy.serve.folders.summary import Summary

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


class MaskKind(StrEnum):
    """Kinds of masks."""

    palette = "palette"
    gray = "gray"
    none = "none"


class AreasKind(StrEnum):
    """Kinds of tables."""

    jsonl = "jsonl"
    parquet = "parquet"
    none = "none"


class EngineName(StrEnum):
    """Who does the work."""

    local = "local"
    ray = "ray"


OUTPUTS, VIEWS, SPEED = "What is written", "How the network looks", "Where and how fast"


def predict(
    artifact: Artifact,
    photos: Annotated[
        list[str] | None,
        typer.Argument(
            help="Folders (with their sub-folders), files, quoted globs, URLs such as s3://..., "
            "and - for a list on stdin.",
            show_default=False,
        ),
    ] = None,
    *,
    out: Annotated[str, typer.Option(help="Folder for the outputs, or a URL.", show_default=False)],
    list_file: Annotated[
        str | None, typer.Option("--list", metavar="FILE", help="A text file, one photo a line.")
    ] = None,
    mask: Annotated[
        MaskKind,
        typer.Option(
            help="PNG with the class ids as pixels; palette shows the colours.",
            rich_help_panel=OUTPUTS,
        ),
    ] = MaskKind.palette,
    overlay: Annotated[
        bool,
        typer.Option(
            "--overlay", help="Photos with the classes laid over.", rich_help_panel=OUTPUTS
        ),
    ] = False,
    probabilities: Annotated[
        bool,
        typer.Option(
            "--probabilities",
            help="npz with float16 [K, h, w] at the network's size; needs an artifact with logits.",
            rich_help_panel=OUTPUTS,
        ),
    ] = False,
    rle: Annotated[
        bool,
        typer.Option("--rle", help="JSON with COCO's run lengths.", rich_help_panel=OUTPUTS),
    ] = False,
    areas: Annotated[
        AreasKind,
        typer.Option(
            help="One table with each photo's class areas, written at the end.",
            rich_help_panel=OUTPUTS,
        ),
    ] = AreasKind.none,
    tile: Annotated[
        str | None,
        typer.Option(
            metavar="HxW",
            help="Look at large photos at their own size, tile by tile.",
            rich_help_panel=VIEWS,
        ),
    ] = None,
    overlap: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS",
            min=0,
            help="Of neighbouring tiles; a quarter of their shorter side by default.",
            rich_help_panel=VIEWS,
        ),
    ] = None,
    scales: Annotated[
        str,
        typer.Option(
            help="Average over these relative sizes, e.g. 0.75,1,1.25.", rich_help_panel=VIEWS
        ),
    ] = "1",
    flip: Annotated[
        bool,
        typer.Option("--flip", help="Average over mirrored photos, too.", rich_help_panel=VIEWS),
    ] = False,
    max_megapixels: Annotated[
        float, typer.Option(help="Skip larger photos.", rich_help_panel=VIEWS)
    ] = 200.0,
    device: Device = "cpu",
    runtime: RuntimeName = "auto",
    precision: Arithmetic = None,
    threads: Annotated[
        int | None,
        typer.Option(
            help="CPU threads of each session; one session of one thread for each core by default.",
            min=1,
            rich_help_panel=SPEED,
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            help="Photos of one size in a run, at most; 1 on CPUs, measured on GPUs by default.",
            min=1,
            rich_help_panel=SPEED,
        ),
    ] = None,
    engine: Annotated[
        EngineName,
        typer.Option(help="This machine, or a Ray cluster.", rich_help_panel=SPEED),
    ] = EngineName.local,
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="A cluster that is there, or auto; a local one is started by default.",
            rich_help_panel=SPEED,
        ),
    ] = None,
    actors: Annotated[
        int | None,
        typer.Option(
            help="Processes of the cluster that hold the network; as many as fit by default.",
            min=1,
            rich_help_panel=SPEED,
        ),
    ] = None,
    classes: Classes = None,
    force: Annotated[
        bool, typer.Option("--force", help="Do everything again, also what is done.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write a mask of each photo's own size; pixel values are class ids.

    The mask of a/b.jpg is OUT/a/b.png; photos that differ only in their suffix keep it
    (b.jpg.png). OUT/classes.json and OUT/legend.png say what the ids mean, OUT/manifest.jsonl what
    became of each photo. Run the same command again to resume, however the run ended.
    Unreadable photos are reported and skipped; the exit code is then 1.

    Example: srdeploy predict deploy/night photos --out masks --overlay

    Large photos: srdeploy predict deploy/night maps --out masks --tile 1024x1024
    """
    from srdeploy import console
    from srdeploy.artifacts.artifact import spec_from_classes
    from srdeploy.errors import UserError
    from srdeploy.serve.folders.predict import predict_photos
    from srdeploy.serve.folders.settings import PredictSettings
    from srdeploy.serve.scheduling.planner import ModelSource
    from srdeploy.validation import parse_size, validated

    console.set_quiet(quiet or as_json)
    settings = validated(
        PredictSettings,
        {
            "mask": mask.value,
            "overlay": overlay,
            "probabilities": probabilities,
            "rle": rle,
            "areas": areas.value,
            "tile": parse_size(tile, "--tile") if tile is not None else None,
            "overlap": overlap,
            "scales": tuple(part.strip() for part in scales.split(",")),
            "flip": flip,
            "max_megapixels": max_megapixels,
        },
        "predict",
    )
    if not photos and list_file is None:
        raise UserError("no photos: give folders, files, globs, - for stdin, or --list FILE")
    spec = spec_from_classes(classes) if classes is not None else None
    summary = predict_photos(
        ModelSource("predict", artifact, device, runtime, spec, precision),
        photos or [],
        out,
        settings,
        executor=_executor(engine, threads, batch, ray_address, actors),
        list_file=list_file,
        force=force,
    )
    if as_json:
        console.print_json(summary.model_dump(mode="json") | {"network_busy": summary.network_busy})
    else:
        _tell(summary)
    if summary.left:
        raise typer.Exit(INTERRUPTED)
    if summary.skipped_count:
        raise typer.Exit(1)


def _executor(
    name: EngineName,
    threads: int | None,
    batch: int | None,
    ray_address: str | None,
    actors: int | None,
) -> "Executor":
    from srdeploy.errors import UserError
    from srdeploy.serve.folders.predict import LocalExecutor

    if name is EngineName.ray:
        from srdeploy.serve.folders.ray_executor import RayExecutor

        return RayExecutor(threads, batch, ray_address, actors)
    if ray_address is not None or actors is not None:
        raise UserError("--ray-address and --actors are the cluster's: add --engine ray")
    return LocalExecutor(threads, batch)


def _tell(summary: "Summary") -> None:
    from srdeploy import console

    tell = console.done if summary.images or summary.done_before else console.failed
    before = f" ({summary.done_before:,} were done before)" if summary.done_before else ""
    tell(
        f"{summary.images:,} photos done in {summary.out}{before}: {summary.seconds:.1f} s, "
        f"{summary.images_per_s:.1f} images/s"
    )
    if summary.images:
        console.say(
            f"  network {100 * summary.network_busy:.0f} % busy, {summary.sessions} sessions; "
            f"decode {summary.decode_s:.1f} s, network {summary.run_s:.1f} s, "
            f"encode {summary.encode_s:.1f} s"
        )
    if summary.left:
        console.failed(f"stopped with {summary.left:,} photos left: the same command resumes here")
    if summary.skipped_count:
        console.failed(
            f"{summary.skipped_count:,} photos skipped: the reasons are in "
            f"{Path(summary.out) / 'manifest.jsonl'}"
        )


def register(app: typer.Typer) -> None:
    """Adds the verb to the command line."""
    app.command("predict")(predict)
