"""The artifacts of a benchmark, its settings and its images."""

import itertools
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from srdeploy.artifacts.artifact import MANIFEST, MODEL
from srdeploy.errors import UserError
from srdeploy.files import read_json, sha256_of
from srdeploy.imaging import Pixels, fit
from srdeploy.runs import WEIGHTS, is_run
from srdeploy.runtimes.base import Runtime
from srdeploy.runtimes.registry import has_precisions
from srdeploy.spec import Spec

if TYPE_CHECKING:
    from srdeploy.data import DataSet


@dataclass(frozen=True)
class Setting:
    """How one cell of the matrix is run."""

    runtime: str
    precision: str | None
    """None: what the artifacts say."""
    batch: int
    size: tuple[int, int] | None
    """(height, width); None: the first artifact's usual one."""

    @property
    def arithmetic(self) -> str | None:
        """What open_runtime is told: None where the file decides."""
        return self.precision if has_precisions(self.runtime) else None


@dataclass(frozen=True)
class BenchEntry:
    """One artifact of the comparison."""

    name: str
    path: Path
    checkpoint: Path | None = None
    """The run that it was exported from, which it must match."""
    spec: Spec | None = None
    """The spec of a file that carries none."""
    judged: bool = True
    """False: a row for information, without verdict or accuracy."""
    forms: Mapping[tuple[str, str | None], tuple[Path, ...]] = field(default_factory=dict)
    """By (runtime, precision), if that does not run `path` itself: what it runs instead, such as
    the checkpoint in torch. Several are builds of one artifact, and take turns."""

    def file(self, setting: Setting, opening: int = 0) -> Path:
        """What is opened under `setting` at the `opening`th time."""
        builds = self.forms.get((setting.runtime, setting.precision), (self.path,))
        return builds[opening % len(builds)]


def every_setting(
    runtimes: Sequence[str],
    precisions: Sequence[str | None],
    batches: Sequence[int],
    sizes: Sequence[tuple[int, int] | None],
) -> list[Setting]:
    """All combinations, the last varying fastest."""
    return [Setting(*one) for one in itertools.product(runtimes, precisions, batches, sizes)]


def bench_images(
    runtime: Runtime, dataset: "DataSet | None", size: tuple[int, int] | None, batch: int
) -> Pixels:
    """uint8 [batch, H, W, 3]: the data set's first photos, brought to the size, or noise."""
    _, height, width, _ = runtime.input_shape
    usual = runtime.spec.input.usual
    wanted = size if size is not None else (height or usual[0], width or usual[1])
    if dataset is None:
        noise = np.random.default_rng(0).integers(0, 256, (batch, *wanted, 3))
        return noise.astype(np.uint8)
    photos = [dataset.read(index % len(dataset))[0] for index in range(batch)]
    return np.stack([_resized(fit(photo, runtime.spec), wanted) for photo in photos])


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths; whole paths where those are not told apart by them. One that is
    given twice is numbered."""
    short = [path.resolve().name for path in paths]
    if len(set(short)) < len({path.resolve() for path in paths}):
        short = [str(path) for path in paths]
    seen = Counter[str]()
    names = []
    for name in short:
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return names


def _resized(photo: Pixels, size: tuple[int, int]) -> Pixels:
    from PIL import Image

    picture = Image.fromarray(photo).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(picture)


# Which run an export was made from: known by the hash of its weights, not by its name.


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
