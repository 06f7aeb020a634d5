"""Prediction by a cluster's processes: what it shares with the local engine, and what happens when
one of them dies. Ray runs in processes of its own: its warnings are not ours, its silence is."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from srdeploy.errors import MissingPackageError, UserError
from srdeploy.serve.folders.ray_cluster import BatchActor, Failure, WorkerConfig
from srdeploy.serve.folders.ray_executor import RayExecutor
from srdeploy.serve.folders.settings import PredictSettings
from srdeploy.serve.folders.stores import OutputError
from srdeploy.serve.scheduling.planner import ModelSource

MakeGraph = Callable[..., Path]

needs_ray = pytest.mark.skipif(
    find_spec("ray") is None, reason="no ray on this machine: the cluster engine was NOT tested"
)
pytestmark = pytest.mark.xdist_group("ray")

JOB = """
import json, os, sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from srdeploy.errors import UserError
from srdeploy.serve.folders import ray_executor
from srdeploy.serve.folders.predict import LocalExecutor
from srdeploy.serve.folders.records import Photo
from srdeploy.serve.folders.settings import PredictSettings
from srdeploy.serve.scheduling.planner import ModelSource


class Deadly(Photo):
    def __reduce__(self):
        return eval, ("__import__('os').kill(__import__('os').getpid(), 9)",)


kind, graph, out, names, options, fate = json.loads(sys.argv[1])
if fate == "deadly":
    ray_executor.RETRIES = 0
engine = LocalExecutor() if kind == "local" else ray_executor.RayExecutor(**options)
photos = [
    (Deadly if name == "deadly" else Photo)(path, name, os.path.getsize(path), 0)
    for path, name in names
]
told = {"errors": {}, "done": [], "killed": 0, "ended": None}
source, settings = ModelSource("colour", Path(graph)), PredictSettings(overlay=True)
try:
    for record in engine.records(source, iter(photos), len(photos), out, settings):
        if record.error is not None:
            told["errors"][record.photo.path] = record.error
        told["done"].append(record.photo.name)
        if fate == "killed" and not told["killed"]:
            for process in psutil.Process().children(recursive=True):
                if "MapWorker" in " ".join(process.cmdline()):
                    process.kill()
                    told["killed"] += 1
except UserError as error:
    told["ended"] = [type(error).__name__, str(error)]
told["sessions"] = engine.sessions
Path(sys.argv[2]).write_text(json.dumps(told))
"""


@dataclass
class Told:
    """What a job came to, and what it said on stdout and stderr."""

    job: dict[str, Any]
    output: str


def run_job(
    folder: Path,
    kind: str,
    graph: Path,
    out: Path,
    photos: list[tuple[str, str]],
    fate: str = "",
    **options: object,
) -> Told:
    """photos: (path, name)."""
    result = folder / f"{out.name}.json"
    arguments = json.dumps([kind, str(graph), str(out), photos, options, fate])
    run = subprocess.run(
        [sys.executable, "-c", JOB, arguments, str(result)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=120,
        cwd=folder,
    )
    output = run.stdout.decode()
    assert run.returncode == 0, output
    return Told(json.loads(result.read_text()), output)


def save_photos(folder: Path, count: int) -> list[tuple[str, str]]:
    """Photos of noise with names that no text encoding has, and one that is none."""
    folder.mkdir()
    photos = []
    for index in range(count):
        noise = np.random.default_rng(index).integers(0, 256, (40 + index % 5, 48, 3), np.uint8)
        path = folder / os.fsdecode(b"p\xff%03d.png" % index)
        Image.fromarray(noise).save(path)
        photos.append((str(path), f"{index % 3}/p{index:03d}"))
    (folder / "unreadable.jpg").write_bytes(b"no photo")
    photos.insert(count // 2, (str(folder / "unreadable.jpg"), "unreadable"))
    return photos


def files_below(folder: Path) -> dict[str, bytes]:
    """The content of all files, by relative path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@needs_ray
def test_a_cluster_writes_what_this_process_writes_and_says_nothing(
    make_graph: MakeGraph, tmp_path: Path
) -> None:
    graph, photos = make_graph(), save_photos(tmp_path / "in", 40)
    local = run_job(tmp_path, "local", graph, tmp_path / "local", photos)
    spread = run_job(tmp_path, "ray", graph, tmp_path / "spread", photos, actors=2)
    assert files_below(tmp_path / "spread") == files_below(tmp_path / "local")
    assert sorted(spread.job["done"]) == sorted(local.job["done"]) == sorted(n for _, n in photos)
    assert spread.job["errors"] == local.job["errors"]
    assert list(spread.job["errors"]) == [str(tmp_path / "in" / "unreadable.jpg")]
    assert spread.job["sessions"] >= 1
    assert spread.output == ""


@needs_ray
def test_the_batches_of_a_killed_process_are_repeated(
    make_graph: MakeGraph, tmp_path: Path
) -> None:
    graph, photos = make_graph(work=20), save_photos(tmp_path / "in", 60)
    run_job(tmp_path, "local", graph, tmp_path / "local", photos)
    killed = run_job(tmp_path, "ray", graph, tmp_path / "killed", photos, "killed")
    assert killed.job["killed"] >= 1
    assert sorted(killed.job["done"]) == sorted(name for _, name in photos)
    written = files_below(tmp_path / "killed")
    expected = files_below(tmp_path / "local")
    assert {path: written.get(path) for path in expected} == expected
    assert killed.output == ""


@needs_ray
def test_a_photo_that_kills_its_process_is_skipped_and_the_others_are_done(
    make_graph: MakeGraph, tmp_path: Path
) -> None:
    photos = save_photos(tmp_path / "in", 6)
    photos[-1] = (photos[-1][0], "deadly")
    told = run_job(tmp_path, "ray", make_graph(), tmp_path / "out", photos, "deadly")
    assert sorted(told.job["done"]) == sorted(name for _, name in photos)
    assert "died" in told.job["errors"][photos[-1][0]]
    assert len(told.job["errors"]) == 2  # and the unreadable one
    assert told.output == ""


@needs_ray
def test_an_output_folder_that_takes_no_more_ends_the_job_with_one_line(
    make_graph: MakeGraph, tmp_path: Path
) -> None:
    photos = save_photos(tmp_path / "in", 24)
    out = tmp_path / "out"
    out.mkdir()
    (out / "2").symlink_to("/sys/kernel")  # takes no files, not even of root
    told = run_job(tmp_path, "ray", make_graph(), out, photos)
    kind, message = told.job["ended"]
    assert kind == "OutputError"
    assert f"{out}/2/" in message
    assert "\n" not in message
    assert 0 < len(told.job["done"]) < len(photos)
    assert told.output == ""


@needs_ray
def test_a_cluster_that_is_not_there_is_named(make_graph: MakeGraph, tmp_path: Path) -> None:
    photos = save_photos(tmp_path / "in", 1)
    told = run_job(tmp_path, "ray", make_graph(), tmp_path / "out", photos, address="127.0.0.1:1")
    assert told.job["ended"] == [
        "UserError",
        "no Ray cluster answers at 127.0.0.1:1: Connection refused",
    ]


def test_without_ray_the_line_that_installs_it_is_given(
    make_graph: MakeGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    source = ModelSource("colour", make_graph())
    records = RayExecutor().records(source, iter(()), 0, str(tmp_path / "out"), PredictSettings())
    with pytest.raises(MissingPackageError, match=r"pip install 'ray\[data\]"):
        next(records)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MissingPackageError("onnxruntime", "cpu", "running"), UserError),
        (OutputError("no space left"), OutputError),
        (ValueError("a fault"), RuntimeError),
    ],
)
def test_errors_survive_the_way_from_a_process_of_the_cluster(
    error: Exception, kind: type[Exception]
) -> None:
    arrived = pickle.loads(pickle.dumps(Failure.of(error))).error()
    assert type(arrived) is kind
    assert str(error) in str(arrived)


@needs_ray
def test_a_machine_that_has_another_folder_of_that_name_refuses_to_write_there(
    make_graph: MakeGraph, tmp_path: Path
) -> None:
    import pyarrow

    config = WorkerConfig(
        source=ModelSource("colour", make_graph()),
        out=str(tmp_path / "out"),
        settings=PredictSettings(),
        folder=os.getcwd(),
        mark=str(tmp_path / "out" / ".cluster.part"),
        photos=1,
        cores=1,
        threads=None,
        batch=None,
    )
    batch = pyarrow.array([pickle.dumps((7, ()))], pyarrow.binary())
    table = BatchActor(config)(pyarrow.table({"batch": batch}))
    answer = pickle.loads(table["result"].to_pylist()[0])
    assert answer.number == 7
    assert answer.failure.kind == "user"
    assert "give one that all machines share" in answer.failure.message
    assert not (tmp_path / "out").exists()
