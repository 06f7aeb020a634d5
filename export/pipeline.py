"""From a source to a deploy folder: the graph, the proof that it is the plain one, and the
manifest.

Two networks are traced at once. Tracing is pure Python and takes one core, so the second runs in a
forked process, which starts with everything imported.
"""

import json
import multiprocessing
import shlex
import shutil
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from srdeploy import __version__, console
from srdeploy.artifacts.artifact import MANIFEST, MODEL
from srdeploy.deployable import Deployable, InputKind, OutputKind
from srdeploy.environment import versions
from srdeploy.errors import UserError
from srdeploy.export.certificate import (
    CERTIFICATE,
    Certificate,
    Line,
    identity_lines,
    provenance_line,
    read_model,
    text_digest,
)
from srdeploy.export.parity import parity_line
from srdeploy.export.precision.stage import DIFFERENCES, TypeOptions, write_converted
from srdeploy.export.source import Source, source_of_run
from srdeploy.export.to_onnx import NETWORK_KEY, export_onnx
from srdeploy.files import sha256_of, whole_folder, write_json
from srdeploy.models.auxiliary import AuxiliaryHead

FLOAT32 = TypeOptions()

FRESH = "fresh.onnx"
"""The graph of the network built fresh, until it has been compared."""


@dataclass(frozen=True)
class ExportResult:
    """What `export_source` wrote."""

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
    types: TypeOptions = FLOAT32,
    force: bool = False,
) -> ExportResult:
    """export_source of a run, compared on the photos in `images`, else on the run's samples.

    Raises UserError also for a run without weights, and for absent photos.
    """
    source = source_of_run(run_folder, images)
    return export_source(source, out, input=input, output=output, types=types, force=force)


def export_source(
    source: Source,
    out: Path | None = None,
    *,
    input: InputKind = "uint8",
    output: OutputKind = "labels",
    types: TypeOptions = FLOAT32,
    force: bool = False,
    certified: Path | None = None,
) -> ExportResult:
    """Exports a plain network to `out` (deploy/NAME): model.onnx, manifest and certificate.

    The float32 graph is compared with that of a network built fresh from its name, which no
    training code has touched, and run against torch on the source's pictures. Where `types` asks
    for another precision, that graph is then converted, and the result compared with it. The folder
    is written whole, also where a line of the certificate fails. Raises UserError for weights or a
    network that can't be used, for types that it can't have, and where `out` exists (force
    replaces a deploy folder). certified: where to keep the float32 graph, for what compares with
    it later.
    """
    types = types.calibrated_on(source.training_data)
    out = out if out is not None else Path("deploy") / f"{source.name}{types.suffix}"
    _check_target(out, force)
    network, heads = source.build()
    with (
        console.progress() as bar,
        whole_folder(out) as folder,
        tempfile.TemporaryDirectory(prefix="srdeploy-") as aside,
    ):
        task = bar.add_task("exporting", total=5 if types.converts else 4)
        plain = (Path(aside) if types.converts else folder) / MODEL
        fresh = Path(aside) / FRESH

        def export_fresh() -> None:
            _export(source.build_fresh(network), source, fresh, input, output)

        with forked(export_fresh) as fresh_is_there:
            _export(network, source, plain, input, output)
            bar.update(task, advance=2, description="comparing with torch on photos")
            # Read back: what is judged and converted from here on is what the file holds.
            model = read_model(plain)
            parity = parity_line(
                network, source.spec, plain, source.pictures, source.synthetic, model
            )
            bar.update(task, advance=1, description="comparing with the network built fresh")
            fresh_is_there()
        identity = identity_lines(read_model(fresh), model)
        bar.update(task, advance=1, description=f"converting to {types.precision}")
        converted: tuple[Line, ...] = ()
        if types.converts:
            converted = write_converted(
                plain,
                model,
                folder / MODEL,
                source.spec,
                source.pictures,
                types,
                synthetic=source.synthetic,
            )
            bar.update(task, advance=1)
        if certified is not None:
            shutil.copyfile(plain, certified)
        weights = {} if source.weights is None else {source.weights.name: source.weights}
        provenance = provenance_line(
            {MODEL: folder / MODEL, **weights},
            spec_sha256=text_digest(source.spec.to_json()),
            device="cpu",
            photos=0 if source.synthetic else len(source.pictures),
        )
        certificate = Certificate(lines=(*identity, parity, *converted, provenance))
        certificate.write(folder / CERTIFICATE)
        digest = str(identity[0].figures["digest_deployed"])
        opset = int((converted or identity)[0].figures["opset"])
        manifest = _manifest(source, heads, folder, out, digest, opset, input, output, types)
        write_json(folder / MANIFEST, manifest)
    return ExportResult(folder=out, certificate=certificate, manifest=manifest)


def describe_files(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Name -> SHA-256 and size of files in a deploy folder."""
    return {
        name: {"sha256": sha256_of(folder / name), "bytes": (folder / name).stat().st_size}
        for name in names
    }


def _check_target(out: Path, force: bool) -> None:
    """Nothing but an older deploy folder is ever replaced."""
    if not out.exists():
        return
    if not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST).is_file()):
        raise UserError(f"{out} exists and is no deploy folder: choose another --out")
    if not force and any(out.iterdir()):
        raise UserError(f"{out} exists: replace it with --force, or choose another --out")


def _export(
    network: nn.Module, source: Source, path: Path, input: InputKind, output: OutputKind
) -> None:
    description = {NETWORK_KEY: json.dumps(source.network.identity, sort_keys=True)}
    deployable = Deployable(network, source.spec, input=input, output=output)
    export_onnx(deployable, source.spec, path, input=input, output=output, description=description)


def _manifest(
    source: Source,
    heads: Sequence[AuxiliaryHead],
    folder: Path,
    out: Path,
    digest: str,
    opset: int,
    input: InputKind,
    output: OutputKind,
    types: TypeOptions,
) -> dict[str, Any]:
    """What is in the folder and how to make it again; only `made` changes from export to export."""
    command = ["srdeploy", "export", *source.arguments, "--out", str(out)]
    command += ["--input", input, "--output", output, *types.flags()]
    names = [name for name in (MODEL, CERTIFICATE, DIFFERENCES) if (folder / name).exists()]
    return {
        "srdeploy": __version__,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(command),
        "network": source.network.identity,
        "auxiliary_heads_left_out": [
            {"name": head.name, "parameters": head.parameters} for head in heads
        ],
        "input": input,
        "output": output,
        "precision": types.precision,
        "target": types.target,
        "opset": opset,
        "graph_digest": digest,
        "weights_sha256": None if source.weights is None else sha256_of(source.weights),
        "files": describe_files(folder, names),
        "versions": versions(),
        "spec": source.spec.model_dump(mode="json"),
    }


@contextmanager
def forked(work: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Runs `work` in a forked process from now on; calling what is yielded waits until it is done.

    `work` hands its result over in files: nothing that it changes in memory comes back. It must not
    touch a GPU. The call raises `work`'s own UserError, and RuntimeError with the traceback for
    anything else. A process that the block did not wait for is ended with the block.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(work, sender), daemon=True)
    with warnings.catch_warnings():
        # Python 3.12 warns of threads that the fork leaves behind; the child starts none of them.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    sender.close()

    def finish() -> None:
        try:
            people, fault = receiver.recv()
        except EOFError:
            process.join()
            raise UserError(
                f"the process that exports the plain network ended (exit code {process.exitcode}): "
                "perhaps memory ran out"
            ) from None
        process.join()
        if fault:
            raise UserError(fault) if people else RuntimeError(fault)

    try:
        yield finish
    finally:
        if process.is_alive():
            process.terminate()
            process.join()
        receiver.close()


def _run(work: Callable[[], None], sender: Connection) -> None:
    """Sends (whether people made the mistake, what it was: empty where all went well)."""
    torch.set_num_threads(1)  # threads of a pool do not survive a fork
    try:
        work()
    except UserError as error:
        sender.send((True, str(error)))
    except BaseException:
        sender.send((False, traceback.format_exc()))
    else:
        sender.send((False, ""))
    finally:
        sender.close()
