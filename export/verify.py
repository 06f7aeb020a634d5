"""The converted graph, or the engine built from it, against the certified float32 graph, on photos.

The reference runs in onnxruntime on the CPU: parity has tied it to torch before.
"""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from onnx import ModelProto

from srdeploy.artifacts.artifact import Artifact, open_artifact, read_sidecar
from srdeploy.errors import UserError
from srdeploy.export.certificate import Line, model_file, read_model
from srdeploy.export.comparison import (
    COMPARING_FP32,
    LIMITS,
    SYNTHETIC,
    PrecisionLimits,
    batches,
    compares_features,
)
from srdeploy.export.differences import (
    HALVES,
    UNTYPED,
    Difference,
    open_candidates,
    open_reference,
    part_text,
    share_text,
)
from srdeploy.export.layer_errors import LayerError, explain_jump, layer_errors
from srdeploy.export.precision.half import emulate
from srdeploy.imaging import Pixels
from srdeploy.precision import Precision
from srdeploy.spec import InputPolicy, Spec


def verification_line(
    reference: Path,
    candidate: Path,
    spec: Spec,
    pictures: Sequence[Pixels],
    precision: Precision,
    page: Path | None = None,
    runtime: str = "auto",
    *,
    masks: Sequence[Pixels] | None = None,
    synthetic: bool = False,
    device: str | None = None,
    model: ModelProto | None = None,
) -> Line:
    """The line `verification`: `candidate`, at `precision`, against `reference` in float32.

    reference: the certified .onnx file or its deploy folder; candidate: an .onnx file, a deploy
    folder or an .engine file. pictures: uint8 [H, W, 3], any sizes; masks: their true labels, uint8
    [H, W]. `synthetic`: the pictures are no photos, which the line then says. Compared are labels
    and, where they can be had, logits, at the smallest, usual and largest size and at batch > 1,
    with `LIMITS`; an engine at the sizes of its profile. 16-bit graphs are judged with every
    rounding emulated and, for fp16, also as onnxruntime runs the file. Where it fails, the detail
    ends with the layers where the difference begins. page: where to write the difference page.
    device: cpu, cuda or cuda:N [cuda for engines, else cpu]. model: what the reference's file
    holds, where it has been read. Raises UserError where something can't be run, or does not belong
    together.
    """
    artifact = open_artifact(candidate)
    _check(artifact, spec, pictures, masks)
    file = model_file(reference)
    plain = read_model(file) if model is None else model
    # Also right after a conversion: what is verified is what the file holds.
    graph = read_model(artifact.file) if artifact.kind != "engine" else None
    limits = LIMITS[precision]
    if precision == "fp32" and compares_features(plain):
        limits = COMPARING_FP32
    policy, most = _promised(artifact, spec)
    with tempfile.TemporaryDirectory(prefix="srdeploy-") as name, ExitStack() as stack:
        folder = Path(name)
        inside = open_reference(plain, file, spec, folder, stack)
        candidates = open_candidates(
            artifact, graph, spec, precision, runtime, device, folder, stack
        )
        ties = precision == "fp32"
        found = [Difference(run.computed_by, spec, limits, ties_count=ties) for run in candidates]
        for index, (size, images) in enumerate(batches(pictures, policy, most)):
            labels, logits = inside.run(images)
            assert logits is not None
            # Single photos of the usual size come first, in the pictures' order.
            target = masks[index] if masks is not None and index < len(masks) else None
            for run, one in zip(candidates, found, strict=True):
                one.add(size, images, (labels, logits), *run.run(images), target)
    passed = all(one.passed for one in found)
    worst = min(found, key=lambda one: (one.passed, one.finite is not False, one.counted))
    layers: list[LayerError] = []
    where = ""
    if not passed or page is not None:
        layers, where = _layers(artifact, plain, graph, precision, limits, worst, mend=not passed)
    summary = _detail(found, precision, limits)
    line = Line(
        name="verification",
        passed=passed,
        detail=summary + ("" if passed else f"; {where}") + SYNTHETIC * synthetic,
        figures=_figures(artifact, precision, limits, found, layers, synthetic),
    )
    if page is not None:
        from srdeploy.export.difference_page import Findings, write_difference_page

        files = (file.stat().st_size, artifact.file.stat().st_size)
        findings = Findings(
            line,
            summary + SYNTHETIC * synthetic,
            precision,
            limits,
            spec,
            tuple(found),
            worst,
            layers,
            where,
            files,
        )
        write_difference_page(findings, page)
    return line


def _check(
    artifact: Artifact, spec: Spec, pictures: Sequence[Pixels], masks: Sequence[Pixels] | None
) -> None:
    if artifact.kind == "run":
        raise UserError(f"{artifact.path} is a run folder: verify what was exported from it")
    if artifact.spec is not None and artifact.spec != spec:
        raise UserError(
            f"{artifact.path} has other classes or pre-processing than its reference: export both "
            "from one run"
        )
    if not pictures:
        raise UserError(f"no pictures to verify {artifact.path} on: give a folder with --images")
    if masks is None:
        return
    if len(masks) != len(pictures):
        raise UserError(f"{len(masks)} masks for {len(pictures)} pictures: give one for each")
    for picture, mask in zip(pictures, masks, strict=True):
        if mask.shape != picture.shape[:2]:
            sizes = [f"{shape[0]}x{shape[1]}" for shape in (mask.shape, picture.shape)]
            raise UserError(f"a mask of {sizes[0]} for a picture of {sizes[1]}: give its own mask")


def _promised(artifact: Artifact, spec: Spec) -> tuple[InputPolicy, int | None]:
    """The sizes to compare at, and the most images in a batch: an engine takes its profile's."""
    profiles = read_sidecar(artifact.file).profiles if artifact.kind == "engine" else ()
    if not profiles:
        return spec.input, None
    profile = profiles[0]
    sizes = {"smallest": profile.smallest, "usual": profile.usual, "largest": profile.largest}
    policy = spec.input.model_copy(update={name: shape[1:] for name, shape in sizes.items()})
    return policy, profile.largest[0]


def _layers(
    artifact: Artifact,
    plain: ModelProto,
    graph: ModelProto | None,
    precision: Precision,
    limits: PrecisionLimits,
    worst: Difference,
    mend: bool,
) -> tuple[list[LayerError], str]:
    """The error of every layer, on the photo and at the size that differ most among the smallest
    that fail; and what they say, with flags where there is something to `mend`. For an engine, of
    the graph that it was built from."""
    if graph is None:
        file = artifact.file.with_name(read_sidecar(artifact.file).onnx)
        if not file.is_file():
            return [], (
                f"an engine's layers can't be looked into, and {file.name}, which it was built "
                "from, is not beside it"
            )
        graph = read_model(file)
    if precision in HALVES:
        graph = emulate(graph)
    errors = layer_errors(plain, graph, worst.telling_photo())
    return errors, explain_jump(errors, limits.rounding, mend and precision not in UNTYPED)


def _detail(found: Sequence[Difference], precision: Precision, limits: PrecisionLimits) -> str:
    """The least favourable figure of all ways of running."""
    cases = [case for one in found for case in one.cases]
    if sizes := sorted({case.size for case in cases if case.finite is False}):
        return f"NaN or infinity in the logits of {precision} at {'; '.join(sizes)}"
    counted, least = min(one.counted for one in found), min(one.least for one in found)
    text = (
        f"{precision} labels agree on {share_text(counted)} of pixels (needed "
        f"{share_text(limits.agreement)}), on {share_text(least)} in the worst of "
        f"{len(cases)} batches (needed {share_text(limits.least)})"
    )
    differences = [d for one in found if (d := one.relative_difference) is not None]
    if differences:
        allowed = "" if limits.logits is None else f" (allowed {part_text(limits.logits)})"
        text += f"; logits differ by {part_text(max(differences))} of the largest at most{allowed}"
    else:
        text += "; it gives only labels, so logits and NaN were not looked at"
    scores = [score for one in found if (score := one.against_masks) is not None]
    if scores:
        score = min(scores, key=lambda one: one.gain)
        error = "" if score.error is None else f" ± {100 * score.error:.2f}"
        text += (
            f"; mIoU {100 * score.candidate:.2f} %, of float32 {100 * score.reference:.2f} % "
            f"({100 * score.gain:+.2f}{error}, {100 * limits.miou_loss:.2f} lower is allowed)"
        )
    return text


def _figures(
    artifact: Artifact,
    precision: Precision,
    limits: PrecisionLimits,
    found: Sequence[Difference],
    layers: Sequence[LayerError],
    synthetic: bool,
) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "precision": precision,
        "candidate": artifact.file.name,
        "limits": limits.model_dump(mode="json"),
        "runs": [one.figures() for one in found],
        "layers": [one.model_dump(mode="json") for one in layers],
    }
    return figures | ({"drawn": True} if synthetic else {})
