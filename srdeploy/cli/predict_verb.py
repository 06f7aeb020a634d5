"""`srdeploy predict`: masks and more for folders of photos."""

from enum import StrEnum
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
    SettingTexts,
)
from srdeploy.cli.verbs import USE, add_verb

if TYPE_CHECKING:
    from srdeploy.cli.settings import PredictionSettings
    from srdeploy.serve.folders.predict import Executor
    from srdeploy.serve.folders.summary import Summary

INTERRUPTED = 130
"""Exit code after Ctrl-C, as in shells."""


class MaskKind(StrEnum):
    """What the pixels of a mask file show."""

    palette = "palette"
    gray = "gray"
    none = "none"


class AreasKind(StrEnum):
    """File format of the table of class areas."""

    jsonl = "jsonl"
    parquet = "parquet"
    none = "none"


class EngineName(StrEnum):
    """Where the work is done."""

    local = "local"
    ray = "ray"


OUTPUTS, VIEWS, SPEED = "Outputs", "Views of each photo", "Device and speed"


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
    mask: Annotated[
        MaskKind,
        typer.Option(
            metavar="KIND",
            help="PNG whose pixels are class ids: palette (in colour), gray, or none.",
            rich_help_panel=OUTPUTS,
        ),
    ] = MaskKind.palette,
    overlay: Annotated[
        bool,
        typer.Option(
            "--overlay",
            help="Also write photos with the classes laid over.",
            rich_help_panel=OUTPUTS,
        ),
    ] = False,
    areas: Annotated[
        AreasKind,
        typer.Option(
            metavar="FORMAT",
            help="Table of class areas in each photo: jsonl, parquet or none.",
            rich_help_panel=OUTPUTS,
        ),
    ] = AreasKind.none,
    tile: Annotated[
        str | None,
        typer.Option(
            metavar="HxW",
            help="Run large photos at full size, tile by tile.",
            rich_help_panel=VIEWS,
        ),
    ] = None,
    scales: Annotated[
        str,
        typer.Option(
            metavar="F,F,...",
            help="Average over these relative sizes, e.g. 0.75,1,1.25.",
            rich_help_panel=VIEWS,
        ),
    ] = "1",
    flip: Annotated[
        bool,
        typer.Option("--flip", help="Also average over mirrored photos.", rich_help_panel=VIEWS),
    ] = False,
    device: Device = "cpu",
    runtime: RuntimeName = "auto",
    precision: Arithmetic = None,
    engine: Annotated[
        EngineName,
        typer.Option(
            metavar="WHERE", help="local, or ray for a Ray cluster.", rich_help_panel=SPEED
        ),
    ] = EngineName.local,
    settings: SettingTexts = None,
    classes: Classes = None,
    force: Annotated[
        bool, typer.Option("--force", help="Start over, including finished photos.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write a mask of each photo's own size; pixel values are class ids.

    The mask of a/b.jpg is OUT/a/b.png; photos that differ only in their suffix keep it (b.jpg.png).
    OUT/classes.json and OUT/legend.png explain the ids, OUT/manifest.jsonl lists what became of
    each photo. The same command goes on where a run ended, however it ended. Unreadable photos are
    reported and skipped, and make the exit code 1.

    Settings for --set KEY=VALUE. More outputs: probabilities=true (npz), rle=true (COCO run
    lengths). Reading: list=FILE (one photo a line), max_megapixels (200). Tiles: overlap in pixels
    (a quarter of their shorter side). Speed: threads, batch. Ray: ray_address (HOST:PORT or auto),
    actors.

    Example: srdeploy predict deploy/night photos --out masks --overlay

    Example: srdeploy predict deploy/night maps --out masks --tile 1024x1024
    """
    from srdeploy import console
    from srdeploy.artifacts.artifact import spec_from_classes
    from srdeploy.cli.settings import PredictionSettings, load_settings
    from srdeploy.errors import UserError
    from srdeploy.serve.folders.predict import predict_photos
    from srdeploy.serve.folders.settings import PredictSettings
    from srdeploy.serve.scheduling.planner import ModelSource
    from srdeploy.validation import parse_size, validated

    console.set_quiet(quiet or as_json)
    rare = load_settings(PredictionSettings, settings or ())
    outputs = validated(
        PredictSettings,
        {
            "mask": mask.value,
            "overlay": overlay,
            "probabilities": rare.probabilities,
            "rle": rare.rle,
            "areas": areas.value,
            "tile": parse_size(tile, "--tile") if tile is not None else None,
            "overlap": rare.overlap,
            "scales": tuple(part.strip() for part in scales.split(",")),
            "flip": flip,
            "max_megapixels": rare.max_megapixels,
        },
        "predict",
    )
    if not photos and rare.list is None:
        raise UserError("no photos: give folders, files, globs, - for stdin, or --set list=FILE")
    spec = spec_from_classes(classes) if classes is not None else None
    summary = predict_photos(
        ModelSource("predict", artifact, device, runtime, spec, precision),
        photos or [],
        out,
        outputs,
        executor=_executor(engine, rare),
        list_file=rare.list,
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


def _executor(name: EngineName, rare: "PredictionSettings") -> "Executor":
    from srdeploy.errors import UserError
    from srdeploy.serve.folders.predict import LocalExecutor

    if name is EngineName.ray:
        from srdeploy.serve.folders.ray_executor import RayExecutor

        return RayExecutor(rare.threads, rare.batch, rare.ray_address, rare.actors)
    if rare.ray_address is not None or rare.actors is not None:
        raise UserError("ray_address and actors are settings of the cluster: add --engine ray")
    return LocalExecutor(rare.threads, rare.batch)


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
            f"  network {100 * summary.network_busy:.0f} % busy in {summary.sessions} sessions: "
            f"decode {summary.decode_s:.1f} s, network {summary.run_s:.1f} s, encode "
            f"{summary.encode_s:.1f} s, all at the same time"
        )
    if summary.left:
        console.failed(
            f"stopped with {summary.left:,} photos left: the same command goes on from here"
        )
    if summary.skipped_count:
        console.failed(
            f"{summary.skipped_count:,} photos skipped: the reasons are in "
            f"{Path(summary.out) / 'manifest.jsonl'}"
        )


def register(app: typer.Typer) -> None:
    """Adds the verb to the command line."""
    add_verb(app, "predict", predict, USE)
