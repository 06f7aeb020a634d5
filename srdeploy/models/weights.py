"""Weight files: safetensors, written and read exactly; torch checkpoints, read without risk."""

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from srdeploy.errors import UserError
from srdeploy.files import explain_os_error, whole_file

_ZIP = b"PK\x03\x04"
_PICKLE = b"\x80"


def save_weights(module: nn.Module, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes the module's state dict to `path` as safetensors. Raises UserError where it can't.

    `metadata` is stored in the file's header. Equal weights and metadata give equal bytes.
    """
    # Copies: safetensors refuses tensors that share memory, and strided ones.
    tensors = {
        name: value.detach().to("cpu", copy=True).contiguous()
        for name, value in module.state_dict().items()
    }
    with whole_file(path) as temporary:
        temporary.write_bytes(_sorted_header(save(tensors, dict(metadata or {}))))


def _sorted_header(content: bytes) -> bytes:
    """The safetensors file `content` with sorted metadata: the library writes random order."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the tensors that follow to 8 bytes
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def load_exactly(module: nn.Module, path: Path) -> None:
    """Loads `path` into `module`, all of it, or nothing where names, shapes or dtypes differ.

    Raises UserError naming the first keys that are missing, not expected, or different.
    """
    tensors = read_tensors(path)
    wanted = module.state_dict()
    faults = differences(wanted, tensors)
    if faults:
        raise UserError(f"{path} does not fit {type(module).__name__}: {faults}")
    module.load_state_dict(tensors)


def load_without_prefix(module: nn.Module, path: Path) -> str:
    """Loads `path` into `module` as load_exactly does, and returns the prefix that was left out.

    Where all names in the file begin with the same parts ("module.", "model."), which wrappers
    around the network put there, and the rest of them fits, these are left out; "" where nothing
    was. Raises UserError as load_exactly does, about the names that come nearest.
    """
    tensors = read_tensors(path)
    wanted = module.state_dict()
    prefix, attempts = "", []
    while True:
        faults = differences(wanted, tensors)
        if not faults:
            module.load_state_dict(tensors)
            return prefix
        attempts.append((sum(name in wanted for name in tensors), prefix, faults))
        first = {name.partition(".")[0] for name in tensors}
        if len(first) != 1 or not all("." in name for name in tensors):
            break
        prefix += f"{first.pop()}."
        tensors = {name.partition(".")[2]: value for name, value in tensors.items()}
    _, prefix, faults = max(attempts, key=lambda attempt: attempt[0])
    without = f" (without the prefix '{prefix}')" if prefix else ""
    raise UserError(f"{path} does not fit {type(module).__name__}{without}: {faults}")


def differences(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """How `found` differs from `wanted` in names, shapes or dtypes; '' where it does not."""
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    other = [
        f"{name} {_kind(found[name])} in the file, {_kind(wanted[name])} in the network"
        for name in wanted
        if name in found and _kind(found[name]) != _kind(wanted[name])
    ]
    parts = []
    if missing:
        parts.append(f"missing {first_few(missing)}")
    if unexpected:
        parts.append(f"not expected {first_few(unexpected)}")
    if other:
        parts.append(f"different {first_few(other)}")
    return "; ".join(parts)


def first_few(names: Sequence[str], count: int = 3) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(names[:count])
    return shown if len(names) <= count else f"{shown} and {len(names) - count} more"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Name -> tensor, on the CPU, from a safetensors file or a torch checkpoint.

    A checkpoint is read with weights_only=True, so that no code in it runs; where it holds the
    weights under "state_dict" or "model", or under DistributedDataParallel's "module." names, they
    are unpacked. Raises UserError where the file is absent, cut short, of another format or holds
    other things.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise explain_os_error(error, path) from error
    if start == _ZIP or start[:1] == _PICKLE:
        return _read_checkpoint(path)
    if path.suffix.lower() == ".onnx":
        raise UserError(
            f"{path} is an ONNX graph: a .safetensors or .pth file of weights is needed"
        )
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({error}): copy or download it again"
        ) from error


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors, or is broken, and reading it could run code in it: "
            "save its state_dict() alone"
        ) from error
    except (RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} is not a whole torch checkpoint ({reason}): copy or download it again"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path} holds a {type(content).__name__}, not named tensors")
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"{path}: '{name}' is a {type(value).__name__}, not a tensor: "
                "save the network's state_dict() alone"
            )
    tensors = {str(name): value.detach() for name, value in content.items()}
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
