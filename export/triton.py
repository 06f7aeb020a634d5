"""A deploy folder as a model of a Triton model repository.

Its configuration is written in protocol buffers' text format: a message is a dict of field names to
values (str, int, bool, `Enum`, another dict, or a list of these for a repeated field); a map is a
list of {"key": ..., "value": ...}.
"""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import onnx
from onnx import ModelProto, TensorProto, ValueInfoProto

from srdeploy.artifacts.artifact import ENGINE_SUFFIX, MODEL, EngineSidecar, read_sidecar
from srdeploy.errors import UserError
from srdeploy.export.certificate import read_model
from srdeploy.files import read_text, sha256_of, whole_folder
from srdeploy.graph.signature import Signature, signature_of
from srdeploy.spec import ONNX_KEY


class Enum(str):
    """The name of an enumeration's value, which is written without quotes."""


def to_pbtxt(message: Mapping[str, Any]) -> str:
    """The message as text, only ASCII: other characters are written as escaped UTF-8 bytes."""
    return "".join(f"{line}\n" for line in _lines(message))


def _lines(message: Mapping[str, Any]) -> Iterator[str]:
    for field, value in message.items():
        several = value if isinstance(value, list) else [value]
        if several and not isinstance(several[0], Mapping):
            scalars = ", ".join(map(_scalar, several))
            yield f"{field}: [{scalars}]" if isinstance(value, list) else f"{field}: {scalars}"
            continue
        for one in several:
            yield f"{field} {{"
            yield from (f"  {line}" for line in _lines(one))
            yield "}"


def _scalar(value: str | int | bool) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | Enum):
        return str(value)
    return _quoted(value)


def _quoted(text: str) -> str:
    # Octal escapes always have three digits here: a digit that follows can't be taken for one.
    parts = []
    for byte in text.encode():
        character = chr(byte)
        if character in '"\\':
            parts.append("\\" + character)
        elif " " <= character <= "~":
            parts.append(character)
        else:
            parts.append(f"\\{byte:03o}")
    return '"' + "".join(parts) + '"'


CONFIG = "config.pbtxt"
LABELS = "labels.txt"
VERSION = "1"
PLAN = "model.plan"

Kind = Literal["auto", "onnx", "engine"]
Device = Literal["auto", "cpu", "gpu"]

_LARGEST_BATCH = 8
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_METADATA = "srdeploy."
"""What our own keys of the metadata begin with."""

_TYPES: dict[int, str] = {
    TensorProto.UINT8: "TYPE_UINT8",
    TensorProto.UINT16: "TYPE_UINT16",
    TensorProto.INT8: "TYPE_INT8",
    TensorProto.INT16: "TYPE_INT16",
    TensorProto.INT32: "TYPE_INT32",
    TensorProto.INT64: "TYPE_INT64",
    TensorProto.FLOAT16: "TYPE_FP16",
    TensorProto.FLOAT: "TYPE_FP32",
}
_INSTANCES = {"auto": "KIND_AUTO", "cpu": "KIND_CPU", "gpu": "KIND_GPU"}


@dataclass(frozen=True)
class Engine:
    """A TensorRT plan of a deploy folder."""

    file: Path
    sidecar: EngineSidecar


def write_repository(
    deploy: Path,
    folder: Path,
    name: str | None = None,
    *,
    kind: Kind = "auto",
    device: Device = "auto",
    largest_batch: int | None = None,
    queue_delay_us: int = 1000,
    instances: int = 1,
) -> Path:
    """Writes the deploy folder as the model `name` (by default its own name) of the repository
    `folder`, and returns the model's folder. Other models there are left alone.

    kind: the ONNX file; the engines of TensorRT proper, one for each compute capability; or, auto,
    the engines where there are any and else the ONNX file. Triton can't load engines of TensorRT
    for RTX. device: where the instances run; auto: a GPU where the server has one, and for engines
    always. largest_batch: images that one batch may hold, 8 by default, and for engines what their
    profiles take. queue_delay_us: how long, in microseconds, a request may wait for others.
    instances: of the model, per device.

    A model that was written here before is replaced. Raises UserError for a name that can't stand
    in Triton's addresses, for a folder that holds something else, and for engines that don't fit.
    """
    deploy, folder = Path(deploy), Path(folder)
    _require_positive(largest_batch, queue_delay_us, instances)
    if not (deploy / MODEL).is_file():
        raise UserError(f"{deploy} has no {MODEL}: give a deploy folder, see srdeploy export")
    name = _checked_name(name if name is not None else deploy.resolve().name)
    target = _checked_target(folder, name)
    model = read_model(deploy / MODEL)
    signature = signature_of(model, deploy / MODEL)
    if signature.spec is None:
        raise UserError(f"{deploy / MODEL} has no '{ONNX_KEY}' metadata: export or strip it again")
    engines = _engines(deploy, kind)
    if engines and device == "cpu":
        raise UserError(f"{engines[0].file} is an engine, which only runs on GPUs: not on a cpu")
    batching = _largest_batch(signature, engines, largest_batch)
    images = next(value for value in model.graph.input if value.name == signature.input_name)
    usual = engines[0].sidecar.profiles[0].usual[1:] if engines else signature.spec.input.usual
    config = {
        "name": name,
        **_platform(engines),
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": batching,
        "input": [_tensor(images, batching)],
        "output": [
            {**_tensor(value, batching), "label_filename": LABELS} for value in model.graph.output
        ],
        **_dynamic_batching(batching, queue_delay_us),
        "instance_group": _instance_group(engines, "gpu" if engines else device, instances),
        "model_warmup": _warmup(images, signature, usual, batching),
        "parameters": _parameters(model, engines),
    }
    with whole_folder(target) as made:
        (made / VERSION).mkdir()
        for source, file in _files(deploy, engines).items():
            shutil.copyfile(source, made / VERSION / file)
        labels = [" ".join(label.splitlines()) for label in signature.spec.classes]
        (made / LABELS).write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
        (made / CONFIG).write_text(to_pbtxt(config), encoding="ascii")
    return target


def _require_positive(largest_batch: int | None, queue_delay_us: int, instances: int) -> None:
    least = (("largest batch", largest_batch, 1), ("instances", instances, 1))
    for what, value, minimum in (*least, ("queue delay", queue_delay_us, 0)):
        if value is not None and value < minimum:
            raise UserError(f"{what} {value}: {minimum} or more is needed")


def _checked_name(name: str) -> str:
    """A name is part of Triton's URLs and of a path."""
    if _NAME.fullmatch(name):
        return name
    fitting = re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip("._-")[:200] or "segmentation"
    raise UserError(
        f"'{name}' can't be a Triton model's name: letters, digits and ._- are allowed, letters or "
        f"digits first; give another name, such as {fitting}"
    )


def _checked_target(folder: Path, name: str) -> Path:
    """Nothing but an older model of ours is ever replaced."""
    if (folder / CONFIG).exists() or (folder / MODEL).exists():
        raise UserError(f"{folder} is itself a model: give the repository that holds the models")
    target = folder / name
    if not target.is_dir() or not any(target.iterdir()):
        return target
    config = target / CONFIG
    foreign = not config.is_file() or f'key: "{ONNX_KEY}"' not in read_text(config)
    others = sorted({path.name for path in target.iterdir()} - {CONFIG, LABELS, VERSION})
    if foreign or others:
        what = f"{others[0]} is in it" if others else "another tool's model is in it"
        raise UserError(
            f"{target} was not written only by srdeploy ({what}): remove it, or give another name"
        )
    return target


def _engines(deploy: Path, kind: Kind) -> list[Engine]:
    """The engines to hand over, none where the ONNX file is. Raises UserError for a mixture."""
    if kind not in get_args(Kind):
        raise UserError(f"kind '{kind}': one of {', '.join(get_args(Kind))} is needed")
    if kind == "onnx":
        return []
    found = [Engine(path, read_sidecar(path)) for path in sorted(deploy.glob(f"*{ENGINE_SUFFIX}"))]
    engines = [engine for engine in found if engine.sidecar.builder == "tensorrt"]
    if not engines:
        if kind == "engine":
            why = "Triton can't load those of TensorRT for RTX" if found else "there is none"
            raise UserError(
                f"{deploy} has no engine for Triton ({why}): build one with TensorRT, or hand over "
                f"{MODEL}"
            )
        return []
    graph = sha256_of(deploy / MODEL)
    owners: dict[str, Path] = {}
    for engine in engines:
        if engine.sidecar.onnx_sha256 != graph:
            raise UserError(f"{engine.file} was not built from this {MODEL}: build it again")
        for capability in engine.sidecar.compute_capabilities:
            other = owners.setdefault(capability, engine.file)
            if other != engine.file:
                raise UserError(
                    f"{other} and {engine.file.name} are both for compute capability {capability}, "
                    "of which Triton takes one: remove the other"
                )
    return engines


def _largest_batch(signature: Signature, engines: Sequence[Engine], wanted: int | None) -> int:
    """Triton's max_batch_size: 0 where the graph fixes N, which then is a dimension like others."""
    if signature.shape[0] is not None:
        if wanted not in (None, signature.shape[0]):
            raise UserError(
                f"largest batch {wanted}: the graph only takes batches of {signature.shape[0]}"
            )
        return 0
    # The server takes one number for all of them, and every request must find a profile.
    limits = [max(profile.largest[0] for profile in engine.sidecar.profiles) for engine in engines]
    limit = min(limits, default=None)
    if limit is None:
        return wanted if wanted is not None else _LARGEST_BATCH
    if wanted is not None and wanted > limit:
        raise UserError(f"largest batch {wanted}: the engine's profiles take {limit} at most")
    return wanted if wanted is not None else limit


def _platform(engines: Sequence[Engine]) -> dict[str, Any]:
    if not engines:
        platform = {"backend": "onnxruntime", "platform": "onnxruntime_onnx"}
        return {**platform, "default_model_filename": MODEL}
    platform = {"backend": "tensorrt", "platform": "tensorrt_plan"}
    if len(engines) == 1:
        return {**platform, "default_model_filename": PLAN}
    files = [(c, _plan(engine)) for engine in engines for c in engine.sidecar.compute_capabilities]
    return {**platform, "cc_model_filenames": [{"key": c, "value": file} for c, file in files]}


def _plan(engine: Engine) -> str:
    capabilities = engine.sidecar.compute_capabilities
    return f"model_{'_'.join('sm' + c.replace('.', '') for c in capabilities)}.plan"


def _files(deploy: Path, engines: Sequence[Engine]) -> dict[Path, str]:
    """What is copied, and under which name."""
    if not engines:
        return {deploy / MODEL: MODEL}
    if len(engines) == 1:
        return {engines[0].file: PLAN}
    return {engine.file: _plan(engine) for engine in engines}


def _tensor(value: ValueInfoProto, batching: int) -> dict[str, Any]:
    """Name, type and dimensions, -1 where they vary, and without N where Triton batches."""
    tensor = value.type.tensor_type
    if tensor.elem_type not in _TYPES:
        kind = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
        raise UserError(f"'{value.name}' is {kind}, a type that Triton has no name for")
    dims = [axis.dim_value if axis.HasField("dim_value") else -1 for axis in tensor.shape.dim]
    return {
        "name": value.name,
        "data_type": Enum(_TYPES[tensor.elem_type]),
        "dims": dims[1:] if batching else dims,
    }


def _dynamic_batching(batching: int, queue_delay_us: int) -> dict[str, Any]:
    if batching < 2:
        return {}
    values = {
        "preferred_batch_size": sorted({max(2, batching // 2), batching}),
        "max_queue_delay_microseconds": queue_delay_us,
    }
    return {"dynamic_batching": values}


def _instance_group(engines: Sequence[Engine], device: Device, count: int) -> list[dict[str, Any]]:
    if device not in get_args(Device):
        raise UserError(f"device '{device}': one of {', '.join(get_args(Device))} is needed")
    group: dict[str, Any] = {"count": count, "kind": Enum(_INSTANCES[device])}
    profiles = min((len(engine.sidecar.profiles) for engine in engines), default=0)
    if profiles > 1:  # else only the first would be used
        group["profile"] = [str(index) for index in range(profiles)]
    return [group]


def _warmup(
    images: ValueInfoProto, signature: Signature, usual: tuple[int, int], batching: int
) -> list[dict[str, Any]]:
    """One request at the usual size (H, W): ready then means warmed up."""
    tensor = _tensor(images, batching=0)
    rows = 1 if signature.input == "uint8" else 2  # [N, H, W, 3] or [N, 3, H, W]
    wanted = {0: 1, rows: usual[0], rows + 1: usual[1]}
    dims = [wanted[at] if size == -1 else size for at, size in enumerate(tensor["dims"])]
    sample = {
        "data_type": tensor["data_type"],
        "dims": dims[1:] if batching else dims,
        "zero_data": True,
    }
    inputs = [{"key": images.name, "value": sample}]
    return [{"name": "usual size", "batch_size": 1, "inputs": inputs}]


def _parameters(model: ModelProto, engines: Sequence[Engine]) -> list[dict[str, Any]]:
    """Our metadata, for clients: the spec says how to fit photos and colour masks."""
    values = {p.key: p.value for p in model.metadata_props if p.key.startswith(_METADATA)}
    for engine in engines:
        capabilities = ", ".join(engine.sidecar.compute_capabilities)
        key = f"{_METADATA}engine.{_plan(engine).removesuffix('.plan')}"
        values[key] = (
            f"TensorRT {engine.sidecar.builder_version}, compute capability {capabilities}"
        )
    return [{"key": key, "value": {"string_value": value}} for key, value in sorted(values.items())]
