"""From a run to a deploy folder: the graph, the proof that it is the plain one, and the
manifest.
"""

import json
import shlex
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from srdeploy import __version__, console
from srdeploy.deployable import Deployable, InputKind, OutputKind
from srdeploy.environment import versions
from srdeploy.errors import UserError
from srdeploy.export.certificate import (
    CERTIFICATE,
    MANIFEST,
    Certificate,
    identity_lines,
    provenance_line,
    read_model,
    text_digest,
)
from srdeploy.export.parity import parity_images, parity_line
from srdeploy.export.to_onnx import NETWORK_KEY, OPSET, export_onnx
from srdeploy.files import sha256_of, whole_folder, write_json
from srdeploy.models import make_network
from srdeploy.runs import Run, load_network, open_run
from srdeploy.serve.artifact import MODEL


@dataclass(frozen=True)
class ExportResult:
    """What `export_run` wrote."""

    folder: Path
    certificate: Certificate
    manifest: dict[str, Any]

    @property
    def model(self) -> Path:
        """The graph's file."""
        return self.folder / MODEL

    @property
    def passed(self) -> bool:
        """Whether every line of the certificate holds."""
        return self.certificate.passed


def export_run(
    run_folder: Path,
    out: Path | None = None,
    *,
    input: InputKind = "uint8",
    output: OutputKind = "labels",
    images: Path | None = None,
    force: bool = False,
) -> ExportResult:
    """Exports a run's plain network to `out` (deploy/NAME): model.onnx, manifest and certificate.

    The graph is compared with that of a network built fresh from its name, which no training code
    has touched, and run against torch on photos: those of `images`, else the run's samples. The
    folder is written whole, also where a line of the certificate fails. Raises UserError for a run
    without weights, for absent photos, and where `out` exists (force replaces a deploy folder).
    """
    run = open_run(run_folder)
    out = out if out is not None else Path("deploy") / run_folder.resolve().name
    _check_target(out, force)
    network = load_network(run)
    photos = parity_images(run, images)
    with console.progress() as bar, whole_folder(out) as folder:
        task = bar.add_task("exporting", total=4)
        _export(network, run, folder / MODEL, input, output)
        bar.update(task, advance=1, description="exporting the plain network, built fresh")
        identity = _identity(run, folder / MODEL, input, output)
        bar.update(task, advance=2, description="comparing with torch on photos")
        parity = parity_line(network, run.spec, folder / MODEL, photos)
        bar.update(task, advance=1)
        provenance = provenance_line(
            {MODEL: folder / MODEL, run.weights.name: run.weights},
            spec_sha256=text_digest(run.spec.to_json()),
            device="cpu",
            photos=len(photos),
        )
        certificate = Certificate(lines=(*identity, parity, provenance))
        certificate.write(folder / CERTIFICATE)
        command = ["srdeploy", "export", str(run_folder), "--out", str(out)]
        command += ["--input", input, "--output", output]
        command += ["--images", str(images)] if images is not None else []
        digest = str(identity[0].figures["digest_deployed"])
        manifest = _manifest(run, folder, command, digest, input, output)
        write_json(folder / MANIFEST, manifest)
    return ExportResult(folder=out, certificate=certificate, manifest=manifest)


def _check_target(out: Path, force: bool) -> None:
    """Nothing but an older deploy folder is ever replaced."""
    if not out.exists():
        return
    if not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST).is_file()):
        raise UserError(f"{out} exists and is no deploy folder: choose another --out")
    if not force and any(out.iterdir()):
        raise UserError(f"{out} exists: replace it with --force, or choose another --out")


def _export(network: nn.Module, run: Run, path: Path, input: InputKind, output: OutputKind) -> None:
    description = {NETWORK_KEY: json.dumps(run.network.model_dump(mode="json"), sort_keys=True)}
    deployable = Deployable(network, run.spec, input=input, output=output)
    export_onnx(deployable, run.spec, path, input=input, output=output, description=description)


def _identity(run: Run, file: Path, input: InputKind, output: OutputKind) -> tuple[Any, ...]:
    """Compares `file` with the graph of the same network, built here from its name alone."""
    with torch.random.fork_rng(devices=[]):
        plain = make_network(run.network.name, run.spec.class_count, **run.network.options)
    with tempfile.TemporaryDirectory(prefix="srdeploy-") as folder:
        fresh = Path(folder) / MODEL
        _export(plain, run, fresh, input, output)
        return identity_lines(read_model(fresh), read_model(file))


def _manifest(
    run: Run,
    folder: Path,
    command: list[str],
    digest: str,
    input: InputKind,
    output: OutputKind,
) -> dict[str, Any]:
    """What is in the folder and how to make it again; only `made` changes from export to export."""
    files = {
        name: {"sha256": sha256_of(folder / name), "bytes": (folder / name).stat().st_size}
        for name in (MODEL, CERTIFICATE)
    }
    return {
        "srdeploy": __version__,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(command),
        "network": run.network.model_dump(mode="json"),
        "input": input,
        "output": output,
        "opset": OPSET,
        "graph_digest": digest,
        "weights_sha256": sha256_of(run.weights),
        "files": files,
        "versions": versions(),
        "spec": run.spec.model_dump(mode="json"),
    }
