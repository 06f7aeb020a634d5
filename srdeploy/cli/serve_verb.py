"""`srdeploy serve`: models over HTTP."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from srdeploy.cli.options import Arithmetic, Classes, Device, Quiet, RuntimeName

_NUMBERS = "Limits"
_SPEED = "Sessions (measured at the start where nothing is said)"


def serve(
    artifacts: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]ARTIFACT...",
            help="Run folders, deploy folders, .onnx or .engine files; the name of each stands in "
            "addresses.",
            show_default=False,
        ),
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but this machine's own needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="File with the key that clients must send; or SRDEPLOY_API_KEY."),
    ] = None,
    device: Device = "cpu",
    runtime: RuntimeName = "auto",
    precision: Arithmetic = None,
    classes: Classes = None,
    sessions: Annotated[
        int | None, typer.Option(help="Of each model, side by side.", min=1, rich_help_panel=_SPEED)
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of each.", min=1, rich_help_panel=_SPEED)
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option(
            help="Images of one run, at most; 1 for no batching.", min=1, rich_help_panel=_SPEED
        ),
    ] = None,
    max_wait_ms: Annotated[
        float,
        typer.Option(
            help="How long a run waits for images that are being decoded.",
            min=0,
            rich_help_panel=_SPEED,
        ),
    ] = 2.0,
    workers: Annotated[
        int, typer.Option(help="Processes, which share the cores.", min=1, rich_help_panel=_SPEED)
    ] = 1,
    max_body_mib: Annotated[
        float, typer.Option(help="Of one request.", min=0.001, rich_help_panel=_NUMBERS)
    ] = 32,
    max_megapixels: Annotated[
        float,
        typer.Option(
            help="Of one photo; read before it is decoded.", min=0.001, rich_help_panel=_NUMBERS
        ),
    ] = 50,
    max_network_megapixels: Annotated[
        float,
        typer.Option(
            help="Of one image as the network sees it; a model's own largest size is always taken.",
            min=0.001,
            rich_help_panel=_NUMBERS,
        ),
    ] = 4.2,
    max_images: Annotated[
        int, typer.Option(help="Of one request.", min=1, rich_help_panel=_NUMBERS)
    ] = 16,
    max_waiting: Annotated[
        int,
        typer.Option(
            help="Requests taken in at once; more get 503 and Retry-After.",
            min=1,
            rich_help_panel=_NUMBERS,
        ),
    ] = 64,
    max_waiting_mib: Annotated[
        float, typer.Option(help="Of their bodies.", min=0.001, rich_help_panel=_NUMBERS)
    ] = 256,
    timeout: Annotated[
        float,
        typer.Option(help="Seconds until an answer.", min=0.001, rich_help_panel=_NUMBERS),
    ] = 30,
    drain: Annotated[
        float,
        typer.Option(
            help="Seconds after SIGTERM in which requests are still taken, while load balancers "
            "turn away.",
            min=0,
            rich_help_panel=_NUMBERS,
        ),
    ] = 1,
    samples: Annotated[
        Path | None,
        typer.Option(help="Folder of photos that the page offers; else it makes some."),
    ] = None,
    log: Annotated[
        Literal["auto", "text", "json"],
        typer.Option(help="Form of the log on stderr; auto: text on a terminal, else JSON lines."),
    ] = "auto",
    quiet: Quiet = False,
) -> None:
    """Serve models over HTTP: KServe v2 with binary tensors, plain images, and a page to look at.

    POST /v1/segment takes an image's bytes and answers with a mask, an overlay or JSON;
    tritonclient works on /v2. The page is at /, the API's description at /docs, metrics at
    /metrics. At the start each model's sessions are laid out by measuring; /v2/health/ready answers
    200 from then on. SIGHUP reloads the models, SIGTERM answers what was taken in and ends.

    Example: srdeploy serve deploy/night, and then
    curl --data-binary @photo.jpg http://127.0.0.1:8000/v1/segment -o mask.png
    """
    import sys

    from srdeploy.artifacts.artifact import spec_from_classes
    from srdeploy.errors import MissingPackageError

    try:
        from srdeploy.environment import usable_cores
        from srdeploy.serve.scheduling.planner import ModelSource, PlanConstraints
        from srdeploy.serve.server.config import (
            KEY_VARIABLE,
            ServerConfig,
            ServerLimits,
            find_api_key,
            name_sources,
        )
        from srdeploy.serve.server.run import run_server
    except ModuleNotFoundError as error:
        raise MissingPackageError(str(error.name), "serve", "srdeploy serve") from error

    spec = spec_from_classes(classes) if classes is not None else None
    run_server(
        ServerConfig(
            sources=tuple(
                ModelSource(name, path, device, runtime, spec, precision)
                for name, path in name_sources(artifacts)
            ),
            host=host,
            port=port,
            api_key=find_api_key(api_key_file, os.environ.get(KEY_VARIABLE), host),
            limits=ServerLimits(
                body_mib=max_body_mib,
                megapixels=max_megapixels,
                network_megapixels=max_network_megapixels,
                images=max_images,
                waiting=max_waiting,
                waiting_mib=max_waiting_mib,
                timeout_s=timeout,
                drain_s=drain,
            ),
            cores=max(1, usable_cores() // workers),
            constraints=PlanConstraints(sessions, threads, max_batch, max_wait_ms),
            samples=samples,
            log=log if log != "auto" else "text" if sys.stderr.isatty() else "json",
            quiet=quiet,
            workers=workers,
        )
    )


def register(app: typer.Typer) -> None:
    """Adds the verb to the command line."""
    app.command("serve")(serve)
