"""From the certified float32 graph to one of other types, with the lines that speak for it."""

from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx import ModelProto
from pydantic import Field

from srdeploy.errors import UserError
from srdeploy.export.certificate import Line, identity_lines
from srdeploy.export.precision.half import to_half
from srdeploy.export.precision.int8 import calibration_pictures, to_int8
from srdeploy.export.precision.strip_precision import strip_precision
from srdeploy.export.verify import verification_line
from srdeploy.files import write_whole
from srdeploy.graph.signature import opset_of
from srdeploy.imaging import Pixels
from srdeploy.precision import Precision, Target
from srdeploy.spec import Spec
from srdeploy.validation import Settings, setting_flags

DIFFERENCES = "differences.html"
"""The page of a deploy folder that shows where the converted graph differs from float32."""


class TypeOptions(Settings):
    """Which types the deployed graph computes in."""

    precision: Precision = "fp32"
    target: Target | None = None
    """What int8 is quantised for (int8 only)."""
    keep: tuple[str, ...] = ()
    """Names, or shell patterns, of nodes that stay float32."""
    ends: bool = False
    """int8: quantise the first and the last weighted layers too."""
    calibration: Path | None = None
    """int8: folder of the photos that ranges are measured on."""
    calibration_count: int = Field(default=64, ge=1)

    @property
    def converts(self) -> bool:
        """Whether the graph's types change; only an engine computes in tf32."""
        return self.precision in ("fp16", "bf16", "int8")

    @property
    def suffix(self) -> str:
        """What the default name of a deploy folder ends with."""
        if self.precision == "fp32":
            return ""
        return f"-{self.precision}" + ("-tensorrt" if self.target == "tensorrt" else "")

    def calibrated_on(self, folder: Path | None) -> "TypeOptions":
        """These, with `folder` for the photos that int8 measures ranges on, where none is named.

        Raises UserError where int8 has no photos.
        """
        if self.precision != "int8" or self.calibration is not None:
            return self
        if folder is None:
            raise UserError(
                "int8 needs photos to measure ranges on: --set calibration=FOLDER, e.g. the photos "
                "that the network was trained on"
            )
        return self.model_copy(update={"calibration": folder})

    def flags(self) -> list[str]:
        """The options of `srdeploy export` that say the same; only those that are not default."""
        flags = [] if self.precision == "fp32" else ["--precision", self.precision]
        flags += [] if self.target is None else setting_flags({"target": self.target})
        for pattern in self.keep:
            flags += ["--keep", pattern]
        flags += setting_flags({"quantise_ends": True}) if self.ends else []
        if self.calibration is not None:
            values = {
                "calibration": str(self.calibration),
                "calibration_images": self.calibration_count,
            }
            flags += setting_flags(values)
        return flags


def write_converted(
    certified: Path,
    model: ModelProto,
    out: Path,
    spec: Spec,
    pictures: Sequence[Pixels],
    options: TypeOptions,
    *,
    synthetic: bool = False,
) -> tuple[Line, ...]:
    """Converts `model`, the float32 graph of the file `certified`, and writes it to `out`; beside
    it, DIFFERENCES.

    Returns the lines `types` (without its types it is the certified graph) and `verification`
    (what it computes on `pictures`, against the certified file). Raises UserError where the graph
    can't be converted.
    """
    converted = convert(model, spec, options)
    write_whole(out, converted.SerializeToString(deterministic=True))
    verified = verification_line(
        certified,
        out,
        spec,
        pictures,
        options.precision,
        page=out.with_name(DIFFERENCES),
        synthetic=synthetic,
        model=model,
    )
    return types_line(model, converted), verified


def convert(model: ModelProto, spec: Spec, options: TypeOptions) -> ModelProto:
    """A float32 graph in the types of `options`, whose `converts` holds. Raises UserError."""
    if options.precision in ("fp16", "bf16"):
        return to_half(model, options.precision, options.keep)
    assert options.precision == "int8"
    assert options.target is not None
    assert options.calibration is not None
    pictures = calibration_pictures(options.calibration, spec, options.calibration_count)
    return to_int8(model, pictures, options.target, options.keep, options.ends)


def types_line(certified: ModelProto, converted: ModelProto) -> Line:
    """The line `types`: without casts and quantisation, is `converted` the certified graph?"""
    plain = strip_precision(converted, opset_of(certified))
    identity, oracles, survivors = identity_lines(certified, plain)
    passed = bool(identity.passed and oracles.passed and survivors.passed)
    kinds = _weight_types(converted)
    inserted = len(converted.graph.node) - len(certified.graph.node)
    share = ", ".join(f"{count} {name}" for name, count in kinds.items())
    fault = next((line.detail for line in (identity, oracles, survivors) if not line.passed), "")
    return Line(
        name="types",
        passed=passed,
        detail=(
            f"without casts and quantisation it is the certified graph; weights: {share}"
            if passed
            else f"without casts and quantisation it is not the certified graph: {fault}"
        ),
        figures={
            "weight_tensors": kinds,
            "inserted_nodes": inserted,
            "opset": opset_of(converted),
        },
    )


def _weight_types(model: ModelProto) -> dict[str, int]:
    """Type -> number of stored matrices and kernels."""
    counts: dict[str, int] = {}
    for tensor in model.graph.initializer:
        if len(tensor.dims) >= 2:
            name = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
            counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))
