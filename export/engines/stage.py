"""An engine for a deploy folder: built from its graph, verified where a GPU is at hand, and written
into its certificate and manifest.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srdeploy import console
from srdeploy.artifacts.artifact import MANIFEST, Builder, EngineSidecar, sidecar_path
from srdeploy.errors import UserError
from srdeploy.export.certificate import CERTIFICATE, Certificate, Line
from srdeploy.export.engines.build import BuildOptions, build_engine, target_name
from srdeploy.export.engines.profiles import parse_profile, profiles_of
from srdeploy.export.pipeline import ExportResult, describe_files
from srdeploy.export.precision.stage import TypeOptions
from srdeploy.export.source import Source
from srdeploy.export.verify import verification_line
from srdeploy.files import write_json
from srdeploy.spec import Spec
from srdeploy.validation import setting_flags, validated


@dataclass(frozen=True)
class EngineRequest:
    """What `srdeploy export --trt` was asked for."""

    builder: Builder
    sm: tuple[str, ...]
    profiles: tuple[str, ...]
    """As text, MIN,OPT,MAX; none: from the spec, or the photos in `sizes_of`."""
    sizes_of: Path | None
    max_batch: int
    workspace_gib: float | None
    timing_cache: Path | None
    refittable: bool

    def flags(self) -> list[str]:
        """The options of `srdeploy export` that say the same."""
        flags = ["--trt", "--builder", self.builder]
        for one in self.sm:
            flags += ["--sm", one]
        values: dict[str, Any] = {}
        if self.profiles:
            values["profile"] = list(self.profiles)
        if self.sizes_of is not None:
            values["sizes_of"] = str(self.sizes_of)
        values["max_batch"] = self.max_batch
        if self.workspace_gib is not None:
            values["workspace"] = self.workspace_gib
        if self.timing_cache is not None:
            values["timing_cache"] = str(self.timing_cache)
        if self.refittable:
            values["refittable"] = True
        return flags + setting_flags(values)

    @classmethod
    def of_flags(cls, wanted: bool, **values: Any) -> "EngineRequest | None":
        """The request, or None where no engine is wanted.

        Raises UserError for options of an engine without --trt.
        """
        request = cls(**values)
        if wanted:
            return request
        idle = cls(
            builder="tensorrt",
            sm=(),
            profiles=(),
            sizes_of=None,
            max_batch=request.max_batch,
            workspace_gib=None,
            timing_cache=None,
            refittable=False,
        )
        if request != idle:
            stray = next(flag for flag in request.flags()[1:] if flag not in idle.flags())
            raise UserError(f"{stray} is about a TensorRT engine: add --trt, or leave it out")
        return None

    def require_ready(self, spec: Spec, types: TypeOptions) -> None:
        """Raises UserError for options that can't be used, before a long export begins."""
        self.options(spec, types, "")

    def options(self, spec: Spec, types: TypeOptions, command: str) -> BuildOptions:
        """For the builder. Raises UserError."""
        if self.profiles:
            profiles = tuple(parse_profile(text) for text in self.profiles)
        else:
            profiles = profiles_of(spec, self.sizes_of, self.max_batch)
        values = {
            "builder": self.builder,
            "precision": types.precision,
            "sm": self.sm,
            "profiles": profiles,
            "workspace_gib": self.workspace_gib,
            "timing_cache": self.timing_cache,
            "refittable": self.refittable,
            "command": command,
        }
        return validated(BuildOptions, values, "--trt")


def add_engine(
    result: ExportResult,
    source: Source,
    types: TypeOptions,
    request: EngineRequest,
    certified: Path,
) -> ExportResult:
    """Builds an engine into the deploy folder, and adds it to certificate and manifest.

    certified: the float32 graph that the folder's was converted from, or the folder's own: on a
    GPU the engine is compared with it. Raises UserError where no engine can be built; the folder
    stays as the export left it.
    """
    command = " ".join([result.manifest["command"], shlex.join([*request.flags(), "--force"])])
    options = request.options(source.spec, types, command)
    try:
        engine = result.folder / target_name(options)
        console.say(f"building {engine.name}")
        sidecar = build_engine(result.model, engine, options)
    except UserError as error:
        raise UserError(f"{error} (the graph was written all the same: {result.model})") from error
    page = result.folder / f"{engine.stem}-differences.html"
    lines = (_engine_line(engine, sidecar), _verified(engine, sidecar, source, certified, page))
    certificate = Certificate(lines=(*result.certificate.lines, *lines))
    certificate.write(result.folder / CERTIFICATE)
    names = [*result.manifest["files"], engine.name, sidecar_path(engine).name]
    names += [page.name] if page.exists() else []
    manifest = {
        **result.manifest,
        "command": command,
        "engine": engine.name,
        "files": describe_files(result.folder, names),
    }
    write_json(result.folder / MANIFEST, manifest)
    return ExportResult(folder=result.folder, certificate=certificate, manifest=manifest)


def _engine_line(engine: Path, sidecar: EngineSidecar) -> Line:
    """What was built. The builder has refused what does not agree with what was asked."""
    kinds = ", ".join(f"{count} {name}" for name, count in sidecar.layer_types.items())
    where = sidecar.gpu or "compute capability " + ", ".join(sidecar.compute_capabilities)
    read = "the engine's layers" if sidecar.read_from == "engine" else "the typed network"
    return Line(
        name="engine",
        passed=True,
        detail=(
            f"{engine.name} for {where} ({sidecar.engine_bytes / 1e6:.1f} MB, "
            f"{sidecar.builder} {sidecar.builder_version}); weighted layers, read from {read}: "
            f"{kinds}"
        ),
        figures=sidecar.model_dump(mode="json", exclude={"spec", "signature"}),
    )


def _verified(
    engine: Path, sidecar: EngineSidecar, source: Source, certified: Path, page: Path
) -> Line:
    """The engine against the certified graph, where it can run."""
    if sidecar.gpu is None:
        capabilities = ", ".join(sidecar.compute_capabilities)
        return Line(
            name="engine verification",
            passed=None,
            detail=(
                f"NOT run: built ahead of time for compute capability {capabilities}, it runs only "
                "on such a GPU; there, srdeploy evaluate and bench take it"
            ),
        )
    line = verification_line(
        certified,
        engine,
        source.spec,
        source.pictures,
        sidecar.precision,
        page=page,
        synthetic=source.synthetic,
    )
    return line.model_copy(update={"name": "engine verification"})
