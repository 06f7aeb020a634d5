"""An ONNX file of any tool without its auxiliary outputs, and proof that the rest is untouched."""

import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import onnx
from google.protobuf.message import DecodeError, Message
from onnx import ModelProto, TensorProto, ValueInfoProto
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from srdeploy import __version__, console
from srdeploy.artifacts.artifact import spec_from_classes
from srdeploy.errors import UserError
from srdeploy.export.certificate import (
    Certificate,
    Line,
    model_file,
    provenance_line,
    read_model,
    text_digest,
)
from srdeploy.export.digest import graph_digest
from srdeploy.export.isomorphism import compare_graphs
from srdeploy.export.output_parity import OutputComparison, compare_outputs
from srdeploy.files import explain_os_error, write_whole
from srdeploy.graph.signature import (
    INPUT_KEY,
    OUTPUT_KEY,
    VERSION_KEY,
    Signature,
    check_class_count,
    signature_of,
    spec_for_graph,
)
from srdeploy.graph.subgraph import (
    ancestors,
    every_tensor,
    function_key,
    peeled,
    restricted,
    size_of,
)
from srdeploy.imaging import Pixels, first_photos
from srdeploy.runtimes.onnx_runtime import import_onnxruntime
from srdeploy.spec import ONNX_KEY, Spec
from srdeploy.validation import Settings, closest

_THINNED = (
    ("node", "initializer", "sparse_initializer", "input", "output")
    + ("value_info", "quantization_annotation")
)  # fmt: skip
"""Fields of a graph that lose entries."""
_OURS = frozenset((ONNX_KEY, INPUT_KEY, OUTPUT_KEY, VERSION_KEY))
_LISTED = 20
"""Survivors that a certificate lists by name; their count is always there."""
_MOST_PHOTOS = 4


class Removed(Settings):
    """What the original has and the stripped file has not."""

    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    nodes: int
    initialisers: int
    functions: int
    parameters: int
    """Values of weights."""
    bytes: int
    """As stored."""

    @classmethod
    def between(cls, original: ModelProto, stripped: ModelProto) -> Self:
        """Counted on both models."""
        size = size_of(original) - size_of(stripped)
        graphs = original.graph, stripped.graph
        outputs = [[value.name for value in graph.output] for graph in graphs]
        inputs = [[value.name for value in graph.input] for graph in graphs]
        tensors = [len(graph.initializer) + len(graph.sparse_initializer) for graph in graphs]
        return cls(
            outputs=tuple(name for name in outputs[0] if name not in outputs[1]),
            inputs=tuple(name for name in inputs[0] if name not in inputs[1]),
            nodes=size.nodes,
            initialisers=tensors[0] - tensors[1],
            functions=len(original.functions) - len(stripped.functions),
            parameters=size.parameters,
            bytes=size.bytes,
        )

    @property
    def nothing(self) -> bool:
        """Whether the stripped file is as large as the original."""
        return not any((self.outputs, self.inputs, self.nodes, self.initialisers, self.functions))

    def __str__(self) -> str:
        if self.nothing:
            return "nothing was there to remove"
        counts = f"{_many(self.nodes, 'node')}, {_many(self.parameters, 'parameter')}"
        outputs = _many(len(self.outputs), "output")
        return f"removed {outputs}, {counts}, {self.bytes / 1e6:.2f} MB"


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
    photos to compare both files on [synthetic images]. Raises UserError for files that can't be
    read, unknown outputs, classes that don't suit, nothing to do, and where the file to write
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


def _check_shapes(parity: OutputComparison, signature: Signature, spec: Spec, path: Path) -> None:
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
) -> OutputComparison:
    """Both files on the same inputs, normalised by the given spec or the file's own."""
    if spec is None and any(entry.key == ONNX_KEY for entry in original.metadata_props):
        spec = signature_of(original, files[0]).spec
    return compare_outputs(original, files, kept, photos=photos, spec=spec)


# The lines of a stripped file's certificate that compare it with the original.


def identity_line(
    original: ModelProto, stripped: ModelProto, kept: Sequence[str], name: str
) -> Line:
    """Is `stripped`, as read from its file, the part of `original` that `kept` is computed from?

    The part is found a second time by removing what nobody reads, and compared by digest and by
    the walk; then every entry of `stripped` is compared with the original's, byte for byte.
    """
    second = restricted(original, peeled(original, kept), kept)
    digests = graph_digest(second), graph_digest(stripped)
    walk = compare_graphs(second, stripped)
    changed = first_change(original, stripped)
    graph = stripped.graph
    passed = digests[0] == digests[1] and walk.equal and changed is None
    if passed:
        tensors = len(graph.initializer) + len(graph.sparse_initializer)
        detail = (
            f"the part of {name} that {_listed(kept)} needs, found in two ways (digest "
            f"{digests[0][:16]}); {_many(len(graph.node), 'node')} and "
            f"{_many(tensors, 'initialiser')} equal to the original's byte for byte"
        )
    else:
        detail = changed or walk.first_difference or "the digests of two extractions differ"
    return Line(
        name="identity",
        passed=passed,
        detail=detail,
        figures={
            "digest_second_extraction": digests[0],
            "digest_stripped": digests[1],
            "walk_equal": walk.equal,
            "first_difference": walk.first_difference,
            "first_change": changed,
            "nodes": len(graph.node),
        },
    )


def survivors_line(stripped: ModelProto, kept: Sequence[str], removed: Removed) -> Line:
    """Does everything in `stripped` lead to an output of `kept`, and is there no other output?"""
    left = list(_survivors(stripped, kept))
    count = len(left)
    return Line(
        name="survivors",
        passed=not count,
        detail=f"{count} survive, first {left[0]}"
        if count
        else f"nothing that {_listed(kept)} does not need; {removed}",
        figures={
            "count": count,
            "first": left[:_LISTED],
            "removed": removed.model_dump(mode="json"),
        },
    )


def first_change(original: ModelProto, stripped: ModelProto) -> str | None:
    """The first thing in `stripped` that is not in `original` exactly so; None where all is."""
    before, after = _outside(original), _outside(stripped)
    for field in sorted(before.keys() | after.keys()):
        if before.get(field) != after.get(field):
            return f"the model's {field} changed"
    for field in _THINNED:
        stray = _stray(getattr(original.graph, field), getattr(stripped.graph, field))
        if stray is not None:
            return f"{field} '{_name(stray)}' is not the original's"
    if _stray(original.functions, stripped.functions) is not None:
        return "a function is not the original's"
    metadata = [
        [entry for entry in model.metadata_props if entry.key not in _OURS]
        for model in (original, stripped)
    ]
    return "the metadata changed" if metadata[0] != metadata[1] else None


def _survivors(model: ModelProto, kept: Collection[str]) -> Iterator[str]:
    part = peeled(model, kept)
    graph = model.graph
    yield from (f"output '{v.name}'" for v in graph.output if v.name not in kept)
    for index, node in enumerate(graph.node):
        if index not in part.nodes:
            yield f"node '{node.name or next(iter(node.output), '')}' ({node.op_type})"
    tensors = [*graph.initializer, *(sparse.values for sparse in graph.sparse_initializer)]
    yield from (f"initialiser '{t.name}'" for t in tensors if t.name not in part.values)
    yield from (f"input '{v.name}'" for v in graph.input if v.name not in part.values)
    yield from (f"value_info '{v.name}'" for v in graph.value_info if v.name not in part.values)
    yield from (
        f"function '{function.name}'"
        for function in model.functions
        if function_key(function) not in part.functions
    )


def _outside(model: ModelProto) -> dict[str, Any]:
    """What belongs to the model and the graph as a whole, by name."""
    thinned = (*_THINNED, "graph", "functions", "metadata_props", "training_info")
    found = {d.name: value for d, value in model.ListFields() if d.name not in thinned}
    graph = {f"graph.{d.name}": v for d, v in model.graph.ListFields() if d.name not in thinned}
    # What the graph says of itself counts too; only the model's metadata is ours to add to.
    graph["graph.metadata_props"] = list(model.graph.metadata_props)
    return found | graph


def _stray(originals: Iterable[Message], found: Iterable[Message]) -> Message | None:
    """The first of `found` that does not follow in `originals`, in the same order."""
    rest = iter(originals)
    for message in found:
        content = message.SerializeToString(deterministic=True)
        if not any(other.SerializeToString(deterministic=True) == content for other in rest):
            return message
    return None


def _name(message: Any) -> str:
    """The name of a node, tensor, value or annotation."""
    for field in ("name", "tensor_name"):
        if getattr(message, field, ""):
            return str(getattr(message, field))
    return str(next(iter(getattr(message, "output", [])), "unnamed"))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


# ONNX models on disk: the graph's file, and side files that hold weights.

LARGEST = 2**31 - 2**20
"""Bytes that a model in memory can hold: protobuf's limit, with room for what is around the
tensors."""


def load_model(path: Path) -> ModelProto:
    """Reads and checks `path` with its side files, as if all had been in one.

    Raises UserError where it is no valid model, a side file is missing, or all is above 2 GiB.
    """
    size = path.stat().st_size if path.is_file() else 0
    size += sum(_length(tensor) for tensor in _tensors_outside(path))
    if size > LARGEST:
        raise UserError(
            f"{path} and its side files hold {size / 2**30:.1f} GiB: models of up to 2 GiB can be "
            "read whole (export it in float16, or without the auxiliary outputs)"
        )
    model = read_model(path)
    for tensor in every_tensor(model):
        if tensor.data_location == TensorProto.DEFAULT:
            tensor.ClearField("data_location")  # loading a side file leaves the default behind
    return model


def side_files(path: Path) -> dict[str, Path]:
    """The files beside `path` that hold weights of its graph, by their path as text."""
    locations = {ExternalDataInfo(tensor).location for tensor in _tensors_outside(path)}
    return {str(path.parent / name): path.parent / name for name in sorted(locations)}


def _tensors_outside(path: Path) -> list[TensorProto]:
    """Tensors whose values are in side files, without them. What is no model has none."""
    try:
        model = onnx.load(str(path), format="protobuf", load_external_data=False)
    except DecodeError:
        return []
    except OSError as error:
        raise explain_os_error(error, path) from error
    return [tensor for tensor in every_tensor(model) if uses_external_data(tensor)]


def _length(tensor: TensorProto) -> int:
    """Bytes that the tensor takes in its side file, 0 where the file does not say."""
    return int(ExternalDataInfo(tensor).length or 0)
