"""An ONNX file of any tool without its auxiliary outputs, and the proof that the rest is untouched.

The file is changed by deletion alone: opset, names, weights and metadata of what stays are the
original's, byte for byte. The classes may be attached, so that the other verbs can run the file.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onnx import ModelProto, ValueInfoProto

from srdeploy import __version__, console
from srdeploy.errors import UserError
from srdeploy.export.certificate import (
    Certificate,
    model_file,
    provenance_line,
    text_digest,
)
from srdeploy.export.onnx_files import load_model, side_files
from srdeploy.export.same_output import Comparison, same_outputs
from srdeploy.export.strip_proof import Removed, identity_line, survivors_line
from srdeploy.export.subgraph import ancestors, restricted
from srdeploy.files import write_whole
from srdeploy.imaging import Pixels
from srdeploy.serve.artifact import spec_from_classes
from srdeploy.serve.onnx_runtime import import_onnxruntime
from srdeploy.serve.photos import first_photos
from srdeploy.serve.signature import (
    INPUT_KEY,
    OUTPUT_KEY,
    VERSION_KEY,
    Signature,
    check_class_count,
    signature_of,
    spec_for_graph,
)
from srdeploy.spec import ONNX_KEY, Spec
from srdeploy.validation import closest

_MOST_PHOTOS = 4


@dataclass(frozen=True)
class StripResult:
    """What `strip_file` wrote."""

    file: Path
    certificate_file: Path
    certificate: Certificate
    kept: tuple[str, ...]
    """Outputs, in the file's order."""
    removed: Removed
    spec: Spec | None
    """What was attached; None where the metadata stayed as it was."""

    @property
    def passed(self) -> bool:
        """Whether every line of the certificate holds."""
        return self.certificate.passed


def strip_file(
    source: Path,
    keep: Sequence[str] = (),
    out: Path | None = None,
    *,
    classes: Path | None = None,
    images: Path | None = None,
    force: bool = False,
) -> StripResult:
    """Writes `source` without what only other outputs than `keep` need, to NAME.stripped.onnx.

    source: an .onnx file, with side files or without, or a deploy folder. keep: may be empty where
    there is one output. out: another file to write; its certificate stands beside it, and both are
    written also where a line of that fails. classes: a classes.json or spec.json to attach. images:
    photos to compare both files on, else pictures are drawn. Raises UserError for files that can't
    be read, unknown outputs, classes that don't suit, nothing to do, and where the file to write
    exists (force replaces it, also where it is `source`).
    """
    source = model_file(source)
    target = _target(source, out, force)
    import_onnxruntime()  # its absence must not show after the work is done
    original = load_model(source)
    kept = kept_outputs(original, keep, source)
    photos = first_photos(images, _MOST_PHOTOS) if images is not None else []
    stripped = restricted(original, ancestors(original, kept), kept)
    if classes is None and not keep and stripped == original:
        raise UserError(
            f"{source} has one output, '{kept[0]}', and all of it leads there: nothing to strip "
            "(--classes classes.json would attach its classes)"
        )
    spec, signature = None, None
    if classes is not None:
        spec, signature = _attach(stripped, spec_from_classes(classes), source)
    _correct_outputs(stripped, kept)
    with tempfile.TemporaryDirectory(prefix="srdeploy-") as folder, console.progress() as bar:
        task = bar.add_task("comparing both files in onnxruntime", total=2)
        staged = Path(folder) / target.name
        content = stripped.SerializeToString(deterministic=True)
        staged.write_bytes(content)
        found = load_model(staged)
        parity = _parity(original, (source, staged), kept, photos, spec)
        if spec is not None and signature is not None:
            _check_shapes(parity, signature, spec, source)
        bar.update(task, advance=1, description="comparing what is left with the original")
        removed = Removed.between(original, found)
        provenance = provenance_line(
            {str(source): source, **side_files(source), f"stripped {target}": staged},
            kept=list(kept),
            spec_sha256=text_digest(spec.to_json()) if spec is not None else None,
        )
        certificate = Certificate(
            lines=(
                identity_line(original, found, kept, source.name),
                survivors_line(found, kept, removed),
                parity.line(kept),
                provenance,
            )
        )
        proof = target.with_suffix(".certificate.json")
        write_whole(target, content)
        certificate.write(proof)
    return StripResult(target, proof, certificate, kept, removed, spec)


def kept_outputs(model: ModelProto, keep: Sequence[str], path: Path) -> tuple[str, ...]:
    """The outputs `keep`, checked, in the model's order. Raises UserError naming the closest."""
    names = [value.name for value in model.graph.output]
    for name in keep:
        if name not in names:
            raise UserError(f"{path} has no output '{name}': {closest(name, names)}")
    if not keep and len(names) > 1:
        raise UserError(f"{path} has {len(names)} outputs ({', '.join(names)}): say which to keep")
    return tuple(name for name in names if name in keep or not keep)


def _target(source: Path, out: Path | None, force: bool) -> Path:
    """Where the result goes; nothing is replaced unless asked for."""
    target = out if out is not None else source.with_suffix(".stripped.onnx")
    if target.suffix.lower() != ".onnx":
        raise UserError(f"--out {target}: an .onnx file is written: give it that suffix")
    if not force and target.exists():
        same = source.exists() and target.samefile(source)
        what = "is the original itself" if same else "exists"
        raise UserError(f"{target} {what}: replace it with --force, or choose another --out")
    return target


def _attach(model: ModelProto, given: Spec, path: Path) -> tuple[Spec, Signature]:
    """Writes the classes into the metadata. Raises UserError where they don't suit the graph."""
    signature = signature_of(model, path)
    if signature.spec is not None and signature.spec != given:
        raise UserError(
            f"{path} has its own classes and pre-processing, and others were given: "
            "leave --classes away"
        )
    _check_layout(model, signature, given, path)
    spec = spec_for_graph(given, signature)
    kinds = [kind for kind in ("labels", "logits") if getattr(signature, kind) is not None]
    _set_metadata(model, ONNX_KEY, spec.to_json())
    _set_metadata(model, INPUT_KEY, signature.input)
    _set_metadata(model, OUTPUT_KEY, "both" if len(kinds) == 2 else kinds[0])
    _set_metadata(model, VERSION_KEY, __version__)
    return spec, signature


def _correct_outputs(model: ModelProto, kept: Sequence[str]) -> None:
    """Our own exports say which outputs they have: no longer true where one is gone."""
    for entry in model.metadata_props:
        if entry.key == OUTPUT_KEY and entry.value not in ("labels", "logits"):
            entry.value = "both" if set(kept) == {"labels", "logits"} else ",".join(kept)


def _set_metadata(model: ModelProto, key: str, value: str) -> None:
    for entry in model.metadata_props:
        if entry.key == key:
            entry.value = value
            return
    model.metadata_props.add(key=key, value=value)


def _check_layout(model: ModelProto, signature: Signature, spec: Spec, path: Path) -> None:
    """Raises UserError where the logits' axes are not [N, K, h, w] with as many classes."""
    for value in model.graph.output:
        if value.name == signature.logits:
            sizes = _sizes(value)
            if sizes[3:] == [spec.class_count] and sizes[1] != spec.class_count:
                raise UserError(
                    f"{path}: the output '{value.name}' has its classes last {sizes}, and "
                    "logits [N, K, H, W] are needed: export it with the classes second"
                )
    check_class_count(signature.classes, spec, path)


def _sizes(value: ValueInfoProto) -> list[int | None]:
    dims = value.type.tensor_type.shape.dim
    return [dim.dim_value if dim.HasField("dim_value") else None for dim in dims]


def _check_shapes(parity: Comparison, signature: Signature, spec: Spec, path: Path) -> None:
    """What the file leaves open about its outputs, seen when it ran. Raises UserError."""
    for case in parity.cases:
        if signature.logits is not None:
            shape = case.outputs[signature.logits]
            if len(shape) != 4 or shape[1] != spec.class_count:
                raise UserError(
                    f"{path} gives '{signature.logits}' {list(shape)}: the class list needs "
                    f"[N, {spec.class_count}, H, W]"
                )
        if signature.labels is not None and len(case.outputs[signature.labels]) != 3:
            shape = case.outputs[signature.labels]
            raise UserError(
                f"{path} gives '{signature.labels}' {list(shape)}: labels [N, H, W] are needed"
            )


def _parity(
    original: ModelProto,
    files: tuple[Path, Path],
    kept: Sequence[str],
    photos: Sequence[Pixels],
    spec: Spec | None,
) -> Comparison:
    """Both files on the same inputs, normalised by the given spec or the file's own."""
    if spec is None and any(entry.key == ONNX_KEY for entry in original.metadata_props):
        spec = signature_of(original, files[0]).spec
    return same_outputs(original, files, kept, photos=photos, spec=spec)
