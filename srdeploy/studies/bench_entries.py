"""What `srdeploy bench` compares: artifacts, the runs they come from, and the form in which each
runtime takes them."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from srdeploy import console
from srdeploy.artifacts.artifact import Artifact, open_artifact
from srdeploy.errors import UserError
from srdeploy.runtimes.base import parse_device
from srdeploy.runtimes.registry import choose_runtime, has_precisions, runs_graphs
from srdeploy.serve.bench.entries import BenchEntry, Setting, find_checkpoints, short_names
from srdeploy.spec import Spec

STORED = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""--precision -> the type in the file."""


@dataclass(frozen=True)
class ScratchFiles:
    """Makes files on the way: each once, in a folder that goes with the benchmark."""

    folder: Path
    builds: int
    device: str
    spec: Spec | None
    made: dict[tuple[Path, str], tuple[Path, ...]] = field(default_factory=dict)


@contextmanager
def entries_for(
    artifacts: Sequence[Path],
    settings: Sequence[Setting],
    *,
    checkpoints: Sequence[Path] = (),
    exits_left_in: bool = True,
    builds: int = 1,
    device: str = "cpu",
    spec: Spec | None = None,
) -> Iterator[list[BenchEntry]]:
    """The entries, in order; files made for them (other types, engine builds, a graph with its
    exits) live as long as the block.

    Where a checkpoint has exits, one more entry is its graph with the exits left in, which shows
    what stripping saves. spec: for those artifacts that carry none. Raises UserError.
    """
    opened = [open_artifact(path) for path in artifacts]
    names = short_names(artifacts)
    foreign = any(one.spec is None for one in opened)
    with tempfile.TemporaryDirectory(prefix="srdeploy-") as text:
        scratch = ScratchFiles(Path(text), builds, device, spec)
        runs = find_checkpoints(artifacts, checkpoints)
        entries = []
        for artifact, name, run in zip(opened, names, runs, strict=True):
            entries.append(
                BenchEntry(
                    name=name,
                    path=artifact.path,
                    checkpoint=run,
                    spec=spec if artifact.spec is None or not foreign else None,
                    forms={
                        (one.runtime, one.precision): found
                        for one in settings
                        if (found := _form(artifact, run, one, scratch)) is not None
                    },
                )
            )
        regulated = _regulated([run or one.path for run, one in zip(runs, opened, strict=True)])
        graphs = any(runs_graphs(_resolved(opened[0], one.runtime, runs[0])) for one in settings)
        if exits_left_in and regulated is not None and graphs and _has_torch():
            entries.append(_with_exits(regulated, settings, scratch))
        yield entries


def _form(
    artifact: Artifact, run: Path | None, setting: Setting, scratch: ScratchFiles
) -> tuple[Path, ...] | None:
    """What this setting runs in place of the artifact; None: the artifact itself."""
    runtime, precision = _resolved(artifact, setting.runtime, run), setting.precision
    if runtime == "torch" and artifact.kind != "run":
        assert run is not None
        if precision not in (None, "fp32"):
            raise UserError(f"--precision {precision}: torch computes runs only in fp32")
        return (run,)
    if runtime == "tensorrt":
        if precision is not None:
            raise UserError(
                f"--precision {precision}: an engine has its own; build one "
                f"(srdeploy export RUN --precision {precision} --trt) and give its folder"
            )
        return _builds(artifact, scratch) if scratch.builds > 1 else None
    if precision is None or has_precisions(runtime):
        return None
    return _converted(artifact, precision, scratch)


def _resolved(artifact: Artifact, runtime: str, run: Path | None) -> str:
    """The runtime's name, auto resolved; a graph whose run is known has torch too."""
    if runtime == "torch" and artifact.kind in ("deploy", "onnx"):
        if run is None:
            raise UserError(
                f"{artifact.path} holds a graph, and the run that torch would take for it is not "
                "known: give it with --checkpoint RUN"
            )
        return "torch"
    return choose_runtime(artifact, runtime)


def _converted(
    artifact: Artifact, precision: str, scratch: ScratchFiles
) -> tuple[Path, ...] | None:
    """The graph in other types, made by the same conversion as `srdeploy export --precision`."""
    stored = "float32" if artifact.signature is None else artifact.signature.precision
    if STORED.get(precision) == stored:
        return None
    if precision not in STORED or stored != "float32" or artifact.signature is None:
        raise UserError(
            f"--precision {precision}: {artifact.path} is stored in {stored} and is not converted "
            f"to it here; export it so (srdeploy export RUN --precision {precision}) and give that "
            "folder"
        )
    key = artifact.path, precision
    if key not in scratch.made:
        from srdeploy.export.certificate import read_model
        from srdeploy.export.precision.stage import TypeOptions, convert
        from srdeploy.files import write_whole

        spec = artifact.spec if artifact.spec is not None else scratch.spec
        if spec is None:
            raise UserError(f"{artifact.path} carries no metadata: give --classes classes.json")
        console.say(f"converting {artifact.path} to {precision}")
        typed = convert(
            read_model(artifact.file), spec, TypeOptions.model_validate({"precision": precision})
        )
        path = scratch.folder / f"{len(scratch.made)}-{precision}.onnx"
        write_whole(path, typed.SerializeToString(deterministic=True))
        scratch.made[key] = (path,)
    return scratch.made[key]


def _builds(artifact: Artifact, scratch: ScratchFiles) -> tuple[Path, ...]:
    """The engine and further builds of it: no two builds choose the same kernels, so that one of
    each side would prove nothing."""
    key = artifact.path, "engine"
    if key not in scratch.made:
        from srdeploy.artifacts.artifact import read_sidecar
        from srdeploy.export.engines.build import BuildOptions, build_engine
        from srdeploy.files import sha256_of
        from srdeploy.runtimes.trt.compatibility import engine_for

        engine = engine_for(artifact, parse_device(scratch.device)[1]).file
        sidecar = read_sidecar(engine)
        graph = engine.with_name(sidecar.onnx)
        if not graph.is_file() or sha256_of(graph) != sidecar.onnx_sha256:
            raise UserError(
                f"{engine}: the graph that it was built from ({sidecar.onnx}) is not beside it, so "
                "it can't be built again: copy it there, or compare single builds with --builds 1"
            )
        options = BuildOptions(
            builder=sidecar.builder,
            precision=sidecar.precision,
            sm=sidecar.compute_capabilities if sidecar.gpu is None else (),
            profiles=sidecar.profiles,
            refittable=sidecar.refittable,
            command=sidecar.command,
        )
        paths = [engine]
        for number in range(1, scratch.builds):
            folder = scratch.folder / f"build-{len(scratch.made)}-{number}"
            folder.mkdir()
            console.say(f"building {engine.name} again ({number + 1} of {scratch.builds})")
            build_engine(graph, folder / engine.name, options)
            paths.append(folder / engine.name)
        scratch.made[key] = tuple(paths)
    return scratch.made[key]


def _regulated(paths: Sequence[Path]) -> Path | None:
    """The first run among `paths` that has exits."""
    from srdeploy.runs import is_run, open_run

    return next((one for one in paths if is_run(one) and open_run(one).exits is not None), None)


def _has_torch() -> bool:
    """Whether a graph with its exits can be exported here; says so where it can't."""
    found = find_spec("torch") is not None
    if not found:
        console.say("no row for the graph with its exits left in: exporting it needs torch")
    return found


def _with_exits(run: Path, settings: Sequence[Setting], scratch: ScratchFiles) -> BenchEntry:
    from srdeploy.studies.with_exits import export_with_exits

    path = scratch.folder / "exits-left-in.onnx"
    console.say(f"exporting {run} with its exits left in, to show what stripping saves")
    export_with_exits(run, path)
    artifact = open_artifact(path)
    forms: dict[tuple[str, str | None], tuple[Path, ...]] = {}
    for one in settings:
        runtime = choose_runtime(artifact, one.runtime) if one.runtime == "auto" else one.runtime
        if one.precision is not None and runs_graphs(runtime) and not has_precisions(runtime):
            found = _converted(artifact, one.precision, scratch)
            if found is not None:
                forms[one.runtime, one.precision] = found
    return BenchEntry(name="exits left in", path=path, judged=False, forms=forms)
