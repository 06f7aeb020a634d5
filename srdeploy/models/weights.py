"""Weight files: safetensors, written and read exactly; torch checkpoints, read without risk."""

import http.client
import json
import os
import pickle
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from srdeploy import __version__, console
from srdeploy.errors import UserError
from srdeploy.files import explain_os_error, sha256_of, whole_file
from srdeploy.validation import closest

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
            "save only its state_dict()"
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
                "save only the network's state_dict()"
            )
    tensors = {str(name): value.detach() for name, value in content.items()}
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


# Pretrained weights: a file, or torchvision's ImageNet backbones

IMAGENET = "imagenet"
BASE_URL = "https://download.pytorch.org/models/"
IMAGENET_FILES = {
    "resnet18": "resnet18-f37072fd.pth",
    "resnet50": "resnet50-0676ba61.pth",
    "resnet101": "resnet101-63fe2227.pth",
    "mobilenet_v2": "mobilenet_v2-b0353104.pth",
}
"""torchvision's file by backbone architecture; the name ends with the start of its SHA-256."""

CLASSIFICATION = (
    *("fc", "classifier", "features.18"),
    *("incre_modules", "downsamp_modules", "final_layer"),
)
"""What an ImageNet file has on top of the backbones here, and is left out: of ResNet, MobileNetV2
and, in the second line, HRNet."""

_CHUNK = 1 << 20
_TIMEOUT_S = 30.0


def load_pretrained(
    network: nn.Module,
    source: str,
    missing: tuple[str, ...] = (),
    *,
    base_url: str = BASE_URL,
) -> str:
    """Loads `source` into `network` and returns one line saying what was loaded and what was not.

    source: "imagenet", or the path of a safetensors or .pth file with either all of the network's
    weights or those of its backbone under torchvision's names (its classification layers are left
    out, and named). `missing` lists prefixes, e.g. "layer4" or "head", whose weights may be absent
    from the file or have another shape there: they stay as initialised. Everything else must fit
    exactly (floating-point numbers are converted to the network's precision): UserError names the
    keys that do not, and then nothing was loaded.
    """
    path = imagenet_file(network, base_url) if source == IMAGENET else Path(source)
    tensors = read_tensors(path)
    target, part = _target(network, tensors)
    wanted = target.state_dict()
    _check_prefixes(missing, target, f"{type(network).__name__} ({part})")
    extra = CLASSIFICATION if part == "backbone" else ()
    dropped = [name for name in tensors if name not in wanted and _under(name, extra)]
    loaded = {n: _in_precision_of(wanted, n, v) for n, v in tensors.items() if n not in dropped}
    kept = [
        name
        for name in wanted
        if _under(name, missing)
        and (name not in loaded or loaded[name].shape != wanted[name].shape)
    ]
    loaded = {name: value for name, value in loaded.items() if name not in kept}
    # Files from before torch 0.4.1 have no batch counts; BatchNorm with a momentum uses none.
    needed = {
        name: value
        for name, value in wanted.items()
        if name not in kept and (name in loaded or not name.endswith("num_batches_tracked"))
    }
    faults = differences(needed, loaded)
    if faults:
        raise UserError(
            f"{path} does not fit {type(network).__name__} ({part}): {faults}; "
            "parts that may stay as initialised must be named"
        )
    target.load_state_dict({**wanted, **loaded})
    numbers = sum(value.numel() for value in loaded.values())
    text = f"{path.name}: {len(loaded)} tensors ({numbers / 1e6:.2f} M values) into the {part}"
    if dropped:
        text += f"; classification layers left out: {_found(CLASSIFICATION, dropped)}"
    if kept:
        text += f"; left as initialised: {_found(missing, kept)}"
    return text


def imagenet_file(network: nn.Module, base_url: str = BASE_URL) -> Path:
    """The local copy of torchvision's weights for the network's backbone, downloaded at need.

    Raises UserError where there is no such file for this network, or the download fails.
    """
    architecture = getattr(getattr(network, "backbone", None), "architecture", None)
    name = IMAGENET_FILES.get(str(architecture))
    if name is None:
        what = f"backbone '{architecture}'" if architecture else type(network).__name__
        raise UserError(
            f"there are no ImageNet weights for {what}: they exist for the backbones "
            f"{', '.join(IMAGENET_FILES)}; train from scratch or name a weight file"
        )
    return download(name, base_url, cache_folder())


def cache_folder() -> Path:
    """Where downloads are kept: $XDG_CACHE_HOME/srdeploy, by default ~/.cache/srdeploy."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "srdeploy"


def download(name: str, base_url: str, folder: Path) -> Path:
    """The file `name` in `folder`, fetched from `base_url` unless a sound copy is there.

    `name` is torchvision's: STEM-XXXXXXXX.pth, X being the first digits of the SHA-256. Raises
    UserError where the server can't be reached or the checksum is wrong; the file is then not kept.
    """
    path = folder / name
    digest = name.rsplit("-", 1)[1].removesuffix(".pth")
    if path.exists():
        if sha256_of(path).startswith(digest):
            return path
        console.warn(f"{path} has another checksum than its name says: it is downloaded again")
        path.unlink()
    url = base_url.rstrip("/") + "/" + name
    console.say(f"downloading {url} to {folder}")
    with whole_file(path) as temporary:
        _fetch(url, temporary)
        found = sha256_of(temporary)
        if not found.startswith(digest):
            raise UserError(
                f"{url}: its SHA-256 starts with {found[: len(digest)]}, not {digest}: "
                "broken or changed on the way, and not kept; try again, or name a weight file"
            )
    return path


def _fetch(url: str, path: Path) -> None:
    """Writes the body of `url` to `path`, with progress in MiB."""
    request = urllib.request.Request(url, headers={"User-Agent": f"srdeploy/{__version__}"})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except (OSError, http.client.HTTPException) as error:
        raise _unreachable(url, error) from error
    with response, path.open("wb") as file, console.progress() as bar:
        size = int(response.headers.get("Content-Length") or 0)
        task = bar.add_task("downloading (MiB)", total=-(-size // _CHUNK) or None)
        while True:
            try:
                chunk = response.read(_CHUNK)
            except (OSError, http.client.HTTPException) as error:
                raise _unreachable(url, error) from error
            if not chunk:
                return
            file.write(chunk)
            bar.advance(task)


def _unreachable(url: str, error: Exception) -> UserError:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return UserError(
        f"{url} can't be downloaded ({reason}): "
        "fetch it on a machine with internet, and name the file instead"
    )


def _target(network: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[nn.Module, str]:
    """The module the names belong to: the network itself, or its backbone; and what to call it."""
    backbone = getattr(network, "backbone", None)
    if isinstance(backbone, nn.Module):
        own, inner = network.state_dict(), backbone.state_dict()
        if sum(name in inner for name in tensors) > sum(name in own for name in tensors):
            return backbone, "backbone"
    return network, "whole network"


def _check_prefixes(prefixes: tuple[str, ...], target: nn.Module, name: str) -> None:
    """A misspelt prefix would permit nothing, and the error would then name the wrong thing."""
    for prefix in prefixes:
        if not any(_under(key, (prefix,)) for key in target.state_dict()):
            parts = (part for part, _ in target.named_children())
            raise UserError(f"{name} has no part '{prefix}': {closest(prefix, parts)}")


def _in_precision_of(wanted: Mapping[str, Tensor], name: str, value: Tensor) -> Tensor:
    """Floating-point weights in the network's own precision: half-precision files load too."""
    if name in wanted and wanted[name].is_floating_point() and value.is_floating_point():
        return value.to(wanted[name].dtype)
    return value


def _under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def _found(prefixes: tuple[str, ...], names: list[str]) -> str:
    return ", ".join(p for p in prefixes if any(_under(name, (p,)) for name in names))
