"""The run folder while training begins, resumes and cleans up after kills."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from srdeploy.errors import UserError
from srdeploy.files import explain_os_error, write_whole
from srdeploy.runs import CONFIG, EXITS, METRICS, SAMPLES, SPEC, STATE, WEIGHTS, is_run, open_run
from srdeploy.spec import Spec
from srdeploy.train.config import TrainConfig, check_resumable
from srdeploy.train.recorder import TENSORBOARD
from srdeploy.validation import validated

PREDICTIONS = "predictions"
"""Folder of the grids of predictions inside the run."""


def require_new(folder: Path, force: bool) -> None:
    """Raises UserError where a new run can't be written to `folder`."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: a run needs a folder")
    # A folder with nothing but its spec is a run that was killed while it began.
    if not folder.exists() or all(p.name == SPEC or _is_torn(p) for p in folder.iterdir()):
        return
    if not is_run(folder):
        raise UserError(f"{folder} exists and is not a run: give another --out, or remove it")
    if not force:
        raise UserError(
            f"{folder} exists: --resume goes on with that run, --force replaces it, "
            "or give another --out"
        )


def write_start(
    folder: Path, config: TrainConfig, spec: Spec, pictures: Mapping[str, bytes]
) -> None:
    """Writes spec.json, config.yaml and samples/ with `pictures` (file name -> content); removes
    what an older run left, and nothing else there.

    Raises UserError where the folder can't be written to.
    """
    try:
        for name in (CONFIG, STATE, WEIGHTS, EXITS, METRICS, SPEC):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise explain_os_error(error, folder) from error
    for name in (SAMPLES, PREDICTIONS, TENSORBOARD):
        shutil.rmtree(folder / name, ignore_errors=True)
    write_whole(folder / SPEC, spec.model_dump_json(indent=1) + "\n")
    write_whole(folder / CONFIG, config.to_yaml())
    for name, content in pictures.items():
        write_whole(folder / SAMPLES / name, content)


def remove_torn(folder: Path) -> None:
    """Removes what killed writes left in the run: half a state.pt is as large as a whole one."""
    for path in folder.rglob(".*.part*"):
        if _is_torn(path):
            path.unlink(missing_ok=True)


def _is_torn(path: Path) -> bool:
    """Whether it is a temporary file of `srdeploy.files.whole_file`, such as
    .state.pt.x7_2ab9q.part.pt."""
    return re.fullmatch(r"\..+\.\w+\.part(\.\w+)?", path.name) is not None and path.is_file()


def saved_config(folder: Path) -> TrainConfig:
    """The configuration a run was started with. Raises UserError where `folder` is no run."""
    run = open_run(folder)
    return validated(TrainConfig, run.config, str(folder / CONFIG))


def require_same(folder: Path, config: TrainConfig) -> None:
    """Raises UserError where `config` is not that of the run in `folder`, naming the first other
    key."""
    check_resumable(saved_config(folder), config, folder)


def require_same_spec(folder: Path, spec: Spec) -> None:
    """Raises UserError where the data set is not the one that the run in `folder` began with."""
    before = open_run(folder).spec
    for name in type(spec).model_fields:
        if getattr(before, name) != getattr(spec, name):
            raise UserError(
                f"{folder} began with another data set: {name} was {getattr(before, name)}, "
                f"is {getattr(spec, name)}; restore the data, or start a new run with another --out"
            )
