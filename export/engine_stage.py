"""An engine for a deploy folder: built from its graph, verified where a GPU is at hand, and written
into its certificate and manifest.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srdeploy import console
from srdeploy.errors import UserError
from srdeploy.export.certificate import CERTIFICATE, MANIFEST, Certificate, Line
from srdeploy.export.pipeline import ExportResult
from srdeploy.export.source import Source
from srdeploy.export.typed import TypeOptions
from srdeploy.files import sha256_of, write_json
from srdeploy.serve.engine_file import Builder, EngineSidecar, Profile, sidecar_path
from srdeploy.spec import Spec
from srdeploy.validation import validated


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
        for profile in self.profiles:
            flags += ["--profile", profile]
        if self.sizes_of is not None:
            flags += ["--sizes-of", str(self.sizes_of)]
        flags += ["--max-batch", str(self.max_batch)]
        if self.workspace_gib is not None:
            flags += ["--workspace", f"{self.workspace_gib:g}"]
        if self.timing_cache is not None:
            flags += ["--timing-cache", str(self.timing_cache)]
        return flags + (["--refittable"] if self.refittable else [])

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
            raise UserError(f"{stray} is about a TensorRT engine: add --trt, or leave it away")
        return None

    def require_ready(self, spec: Spec, types: TypeOptions) -> None:
        """Raises UserError for options that can't be used, before a long export begins."""
        self.options(spec, types, "")

    def options(self, spec: Spec, types: TypeOptions, command: str) -> "BuildOptions":
        """For the builder. Raises UserError."""
        from srdeploy.export.engines.build import BuildOptions
        from srdeploy.export.engines.profiles import parse_profile, profiles_of

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
        return validated(BuildOptions, values, "srdeploy export --trt")


def add_engine(
    result: ExportResult, source: Source, types: TypeOptions, request: EngineRequest
) -> ExportResult:
    """Builds an engine into the deploy folder, and adds it to certificate and manifest."""
    raise UserError("engines are not there yet")
