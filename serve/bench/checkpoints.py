"""Which run an export was made from: known by the hash of its weights, not by its name."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from srdeploy.errors import UserError
from srdeploy.files import read_json, sha256_of
from srdeploy.runs import WEIGHTS, is_run
from srdeploy.serve.artifact import MANIFEST, MODEL


def find_checkpoints(artifacts: Sequence[Path], given: Sequence[Path] = ()) -> list[Path | None]:
    """For each deploy folder (or its model.onnx) the run that it was exported from, else None.

    Looked for among `given`, then where the export's own command says. A run counts only where its
    weights have the hash that the manifest names. Raises UserError where a given run is none, or
    is no artifact's.
    """
    hashes: dict[str, Path] = {}
    for run in given:
        if not is_run(run):
            raise UserError(f"--checkpoint {run} is not a run folder (see srdeploy train)")
        hashes[sha256_of(run / WEIGHTS)] = run
    found: list[Path | None] = []
    used = set()
    for artifact in artifacts:
        manifest = _manifest(artifact)
        wanted = manifest.get("weights_sha256")
        match = hashes.get(str(wanted))
        if match is not None:
            used.add(match)
        found.append(match or _named(manifest))
    for run in hashes.values():
        if run not in used:
            raise UserError(
                f"--checkpoint {run}: none of the artifacts was exported from its weights "
                f"(their {MANIFEST} names other hashes)"
            )
    return found


def _manifest(artifact: Path) -> dict[str, object]:
    folder = artifact if artifact.is_dir() else artifact.parent
    file = folder / MANIFEST
    beside = artifact.is_dir() or artifact.name == MODEL
    if not beside or is_run(folder) or not file.is_file():
        return {}
    content = read_json(file)
    return content if isinstance(content, dict) else {}


def _named(manifest: dict[str, object]) -> Path | None:
    """The run that the export's command names, where it is still there with these weights."""
    words = shlex.split(str(manifest.get("command", "")))
    if len(words) < 3:
        return None
    run = Path(words[2])
    if not is_run(run) or sha256_of(run / WEIGHTS) != manifest.get("weights_sha256"):
        return None
    return run
