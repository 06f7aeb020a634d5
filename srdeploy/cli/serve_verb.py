"""`srdeploy serve`: models over HTTP."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from srdeploy.cli.options import Arithmetic, Classes, Device, Quiet, RuntimeName, SettingTexts
from srdeploy.cli.verbs import USE, add_verb


def serve(
    artifacts: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]ARTIFACT...",
            help="Run or deploy folders, .onnx or .engine files; addresses contain their names.",
            show_default=False,
        ),
    ],
    host: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS", help="Address to listen on; others than localhost need a key."
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="PORT", help="0 takes a free port.", min=0, max=65535)
    ] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Key that clients must send; or set SRDEPLOY_API_KEY."),
    ] = None,
    device: Device = "cpu",
    runtime: RuntimeName = "auto",
    precision: Arithmetic = None,
    classes: Classes = None,
    workers: Annotated[
        int, typer.Option(metavar="N", help="Processes, which share the cores.", min=1)
    ] = 1,
    server_config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="YAML file of settings: see above.", show_default=False),
    ] = None,
    settings: SettingTexts = None,
    samples: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Photos that the page offers (default: synthetic scenes)."
        ),
    ] = None,
    log: Annotated[
        Literal["auto", "text", "json"],
        typer.Option(
            metavar="FORM",
            help="Log on stderr: text, json, or auto (text on a terminal, else JSON lines).",
        ),
    ] = "auto",
    quiet: Quiet = False,
) -> None:
    """Serve models over HTTP: KServe v2 with binary tensors, plain images, and a page to look at.

    POST /v1/segment takes an image and answers with a mask, an overlay or JSON; tritonclient works
    on /v2. The page is at /, the API's description at /docs, metrics at /metrics. At the start the
    server measures how many sessions and threads suit each model; then /v2/health/ready answers
    200. SIGHUP reloads the models, SIGTERM drains in-flight requests and ends.

    Settings, in --server-config (YAML) or as --set KEY=VALUE, which wins. Speed, measured by
    default: sessions, threads, max_batch; also max_wait_ms (2). Limits of one request:
    max_body_mib (32), max_megapixels (50), max_network_megapixels (4.2), max_images (16), timeout
    (30 seconds). Limits of all: max_waiting (64 requests), max_waiting_mib (256). At the end: drain
    (1 second).

    Example: srdeploy serve deploy/night

    Example: curl --data-binary @photo.jpg http://127.0.0.1:8000/v1/segment -o mask.png

    Example: srdeploy serve deploy/night --set max_batch=1 --set timeout=10
    """
    import sys

    from srdeploy.artifacts.artifact import spec_from_classes
    from srdeploy.cli.settings import ServerSettings, load_settings
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

    configured = load_settings(ServerSettings, settings or (), server_config)
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
            limits=ServerLimits(**configured.limits()),
            cores=max(1, usable_cores() // workers),
            constraints=PlanConstraints(**configured.layout()),
            samples=samples,
            log=log if log != "auto" else "text" if sys.stderr.isatty() else "json",
            quiet=quiet,
            workers=workers,
        )
    )


def register(app: typer.Typer) -> None:
    """Adds the verb to the command line."""
    add_verb(app, "serve", serve, USE)
