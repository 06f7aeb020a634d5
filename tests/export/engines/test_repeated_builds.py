"""`srdeploy bench` builds engines again: one build of each side proves nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from srdeploy.artifacts.artifact import Profile, read_sidecar
from srdeploy.errors import UserError
from srdeploy.export.engines.build import BuildOptions, build_engine
from srdeploy.serve.bench.entries import Setting
from srdeploy.studies.bench_entries import entries_for

MakeTyped = Callable[..., Path]

TENSORRT = Setting("tensorrt", None, 1, None)


@pytest.fixture
def engine(rtx: Any, typed_graph: MakeTyped, tmp_path: Path) -> Path:
    """An engine built ahead of time, beside its graph."""
    profile = Profile(smallest=(1, 32, 32), usual=(1, 32, 32), largest=(1, 64, 64))
    options = BuildOptions(builder="rtx", sm=("8.9",), profiles=(profile,), command="again")
    path = tmp_path / "model.sm89.engine"
    build_engine(typed_graph(), path, options)
    return path


def test_further_builds_are_of_the_same_graph_for_the_same_gpu_and_shapes(engine: Path) -> None:
    with entries_for([engine], [TENSORRT], builds=3) as (entry,):
        paths = [entry.file(TENSORRT, opening) for opening in range(4)]
        assert paths[0] == paths[3] == engine
        assert len(set(paths)) == 3
        first, *others = (read_sidecar(path) for path in paths[:3])
        for other in others:
            assert other.onnx_sha256 == first.onnx_sha256
            assert other.profiles == first.profiles
            assert other.compute_capabilities == first.compute_capabilities
            assert other.precision == first.precision
    assert not paths[1].exists()


def test_a_single_build_is_the_engine_itself(engine: Path) -> None:
    with entries_for([engine], [TENSORRT], builds=1) as (entry,):
        assert entry.forms == {}


def test_an_engine_without_its_graph_cannot_be_built_again(engine: Path) -> None:
    engine.with_name("model.onnx").unlink()
    with (
        pytest.raises(UserError, match="is not beside it, so it can't be built again"),
        entries_for([engine], [TENSORRT], builds=2),
    ):
        raise AssertionError("built from nothing")
