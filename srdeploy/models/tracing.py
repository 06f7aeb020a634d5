"""The outputs of a network's modules in one forward pass: grids, channels, layouts, order.

Any module will do, whoever wrote it. Nothing of it changes: modes, random streams, running
statistics and hooks are as before.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import isqrt
from typing import Any, Literal

import torch
from torch import Tensor, nn

from srdeploy.errors import UserError
from srdeploy.outputs import main_logits

PROBE_SIZE = (64, 96)
"""(H, W) of the probing image. The sides differ by a factor that no power of two makes up, so that
[N, H, W, C] can't be taken for [N, C, H, W]."""

Layout = Literal["NCHW", "NHWC", "NLC"]
Size = tuple[int, int]

_BATCH = 2
"""Images per probe: with one, [L, N, C] would look like [N, L, C], and windows like images."""
_MOST_SKIPPED = 16
"""Class tokens, registers and prompts that may stand before the cells."""


@dataclass(frozen=True)
class FeatureMap:
    """One module's output, read as a map over the image."""

    name: str
    """Dotted name of the module; "" for the network itself."""
    kind: str
    """The module's class."""
    layout: Layout
    channels: int
    grid: Size
    """Cells (h, w) at the probe's size."""
    stride: int
    """Input pixels per cell."""
    skipped: int
    """Tokens before the first cell that belong to no place in the image (only NLC)."""


@dataclass(frozen=True)
class Visit:
    """How one module took part in the forward."""

    name: str
    kind: str
    calls: int
    map: FeatureMap | None
    """Its output, or the first part of it; None where that is no map."""
    coarsest: int
    """The largest stride among its output's parts; 0 without a map."""
    entry: int
    """The largest stride among its input's maps; 1 where there is none."""
    takes: int
    """Distinct grids in the longest list of maps that it takes; 0 without one."""
    gives: int
    """Distinct grids in the list of maps that it gives; 0 where it gives none."""
    raises: bool
    """It gives a finer grid than any that it took."""
    modified: bool
    """Its output was written to after it had been given, e.g. by an in-place ReLU."""
    shape: tuple[int, ...] | None
    """The shape of the output, or of its first part; None where that is no tensor."""
    given: str
    """Its output in words, for messages."""


@dataclass(frozen=True)
class Trace:
    """One forward of a network at `size`."""

    size: Size
    visits: dict[str, Visit]
    """The visits by name, in the order in which the modules finished (by their last call)."""
    logits: tuple[int, ...]
    """Shape of the main logits."""

    @property
    def maps(self) -> dict[str, FeatureMap]:
        """The maps of sub-modules that ran once, in the order in which they finished."""
        once = (visit for name, visit in self.visits.items() if name and visit.calls == 1)
        return {visit.name: visit.map for visit in once if visit.map is not None}


def trace_maps(network: nn.Module, size: Size = PROBE_SIZE) -> tuple[FeatureMap, ...]:
    """The maps of all sub-modules that ran once, in the order in which they finished.

    size: (H, W) of the blank image. Raises UserError where the network can't take that size.
    """
    return tuple(trace(network, size).maps.values())


def trace(network: nn.Module, size: Size = PROBE_SIZE, *, training: bool = False) -> Trace:
    """Runs the network once on blank images of `size` and reports what each module gave.

    In evaluation mode, without gradients; also on the meta device. training: the modules that hold
    others are in training mode, so that heads run which only training needs; the inner ones
    (normalisation, dropout) are not. Raises UserError where the network can't take that size or
    gives no logits.
    """
    seen: dict[str, _Seen] = {}
    with undisturbed(network, training), torch.no_grad(), ExitStack() as hooks:
        for name, module in network.named_modules():
            hook = _Watch(seen, name)
            hooks.enter_context(module.register_forward_hook(hook, with_kwargs=True))
        logits = forward(network, blank(network, size))
        modified = {
            name: any(part._version != version for part, version in one.versions)
            for name, one in seen.items()
        }
    reader = _Reader(size)
    # Grids that are plain to see tell how rows of tokens lie on the image.
    for one in seen.values():
        reader.learn((*one.inputs, *one.outputs))
    visits = {name: _visit(name, one, modified[name], reader) for name, one in seen.items()}
    return Trace(size, visits, tuple(logits.shape))


def first_part(output: Any) -> Any:
    """The part of a module's output that is read as its map: itself, or the first of several."""
    if isinstance(output, Mapping):
        output = next(iter(output.values()), None)
    while isinstance(output, tuple | list) and output:
        output = output[0]
    return output


def token_grid(cells: int, size: Size, stride: int | None = None) -> Size | None:
    """The grid (h, w) of `cells` cells that lies evenly on an image of `size`, or None.

    Of several the one closest to what `stride` gives, else the one whose cells are nearest to
    squares.
    """
    low = [side for side in range(1, isqrt(cells) + 1) if cells % side == 0]
    sides = dict.fromkeys([*low, *(cells // side for side in reversed(low))])
    grids = [(side, cells // side) for side in sides if _fits(side, cells // side, size)]
    if stride is None:
        return min(grids, key=lambda grid: _skew(grid, size), default=None)
    height, width = size[0] / stride, size[1] / stride
    return min(grids, key=lambda g: abs(g[0] - height) + abs(g[1] - width), default=None)


@contextmanager
def undisturbed(network: nn.Module, training: bool = False) -> Iterator[None]:
    """Evaluation mode for the block; afterwards every module's mode, its buffers and the random
    streams are as before. training: as for `trace`. Raises UserError for TorchScript modules."""
    if any(isinstance(module, torch.jit.ScriptModule) for module in network.modules()):
        raise UserError(
            f"{type(network).__name__} is or holds a TorchScript module, which can't be looked "
            "into: give the module as it was before scripting or tracing it"
        )
    modes = [(module, module.training) for module in network.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    network.eval()
    for module, _ in modes:
        module.training = training and any(True for _ in module.children())
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers:
                if not buffer.is_meta and not torch.equal(buffer, value):
                    buffer.copy_(value)


def blank(network: nn.Module, size: Size) -> Tensor:
    """Images [2, 3, H, W] of zeros, of the device and the dtype of the network's parameters."""
    like = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros(_BATCH, 3, *size, device=like.device, dtype=like.dtype)


def forward(network: nn.Module, images: Tensor) -> Tensor:
    """The network's main logits; whatever it raises becomes a UserError that names the size."""
    try:
        output = network(images)
    except UserError:
        raise
    except Exception as error:  # a foreign network may raise anything
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        height, width = images.shape[-2:]
        raise UserError(
            f"{type(network).__name__} can't take an image of {height}x{width}, on which it is "
            f"probed ({type(error).__name__}: {lines[0] if lines else 'no message'}): it must run "
            "on only images; if it needs another size, give probe_size=(H, W) (inspect and "
            "models: --size HxW)"
        ) from error
    return main_logits(output)


@dataclass
class _Seen:
    """The hooks' records of one module."""

    kind: str
    calls: int = 0
    inputs: list[tuple[int, ...]] = field(default_factory=list)
    outputs: list[tuple[int, ...]] = field(default_factory=list)
    takes: int = 0
    gives: int = 0
    first: tuple[int, ...] | None = None
    given: str = ""
    versions: list[tuple[Tensor, int]] = field(default_factory=list)


class _Watch:
    """A forward hook that notes the shapes which a module takes and gives."""

    def __init__(self, seen: dict[str, _Seen], name: str) -> None:
        self.seen = seen
        self.name = name

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        one = self.seen.pop(self.name, None) or _Seen(type(module).__name__)
        self.seen[self.name] = one  # the order is that of the last calls
        given = [*args, *kwargs.values()]
        one.calls += 1
        one.inputs = [tuple(tensor.shape) for tensor in _tensors(given)]
        parts = list(_tensors([output]))
        one.outputs = [tuple(tensor.shape) for tensor in parts]
        lists = [value for value in given if isinstance(value, tuple | list)]
        one.takes = max((_grids(value) for value in lists), default=0)
        one.gives = _grids(output) if isinstance(output, tuple | list) else 0
        first = first_part(output)
        one.first = tuple(first.shape) if isinstance(first, Tensor) else None
        one.given = type(first).__name__ + (f" of shape {one.first}" if one.first else "")
        one.versions = [(first, first._version)] if isinstance(first, Tensor) else []


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors in `values` that may be maps, also in lists, tuples and mappings."""
    for value in values:
        if isinstance(value, Tensor):
            if value.dim() in (3, 4):
                yield value
        elif isinstance(value, Mapping):
            yield from _tensors(value.values())
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _grids(values: Iterable[Any]) -> int:
    return len({tuple(t.shape[2:]) for t in values if isinstance(t, Tensor) and t.dim() == 4})


class _Reader:
    """Reads shapes as maps over an image of one size."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.known: dict[Size, None] = {}

    def learn(self, shapes: Iterable[tuple[int, ...]]) -> None:
        """Notes the grids of four-dimensional maps."""
        for shape in shapes:
            found = self.read(shape) if len(shape) == 4 else None
            if found is not None:
                self.known[found[2]] = None

    def read(self, shape: tuple[int, ...]) -> tuple[Layout, int, Size, int] | None:
        """Layout, channels, grid and skipped tokens of a map of `shape`; None where it is none."""
        if len(shape) not in (3, 4) or shape[0] != _BATCH:
            return None
        if len(shape) == 4:
            first = (shape[2], shape[3])
            last = (shape[1], shape[2])
            plain = first == (1, 1) or _fits(*first, self.size)
            swapped = last != (1, 1) and _fits(*last, self.size)
            if plain and swapped:
                plain = _skew(first, self.size) <= _skew(last, self.size)
            if plain:
                return "NCHW", shape[1], first, 0
            return ("NHWC", shape[3], last, 0) if swapped else None
        found = self._tokens(shape[1])
        return None if found is None else ("NLC", shape[2], *found)

    def stride(self, shape: tuple[int, ...]) -> int:
        """Pixels per cell of a map of `shape`, 0 where it is none or a single cell."""
        found = self.read(shape)
        return 0 if found is None or found[2] == (1, 1) else _stride(found[2], self.size)

    def _tokens(self, length: int) -> tuple[Size, int] | None:
        """Grid and skipped tokens of a row of `length` tokens."""
        spare = {grid: length - grid[0] * grid[1] for grid in self.known if grid != (1, 1)}
        fitting = {grid: rest for grid, rest in spare.items() if 0 <= rest <= _MOST_SKIPPED}
        if fitting:
            grid = min(fitting, key=lambda one: fitting[one])
            if fitting[grid] < grid[0] * grid[1]:
                return grid, fitting[grid]
        for skipped in (0, 1, 2, 5):  # none, a class token, a distillation token, four registers
            if length > skipped:
                even = token_grid(length - skipped, self.size)
                if even is not None and _skew(even, self.size) < 0.01:
                    return even, skipped
        return None


def _visit(name: str, one: _Seen, modified: bool, reader: _Reader) -> Visit:
    found = reader.read(one.first) if one.first is not None else None
    map_ = None
    if found is not None:
        layout, channels, grid, skipped = found
        stride = _stride(grid, reader.size)
        map_ = FeatureMap(name, one.kind, layout, channels, grid, stride, skipped)
    taken = [stride for shape in one.inputs if (stride := reader.stride(shape))]
    given = [stride for shape in one.outputs if (stride := reader.stride(shape))]
    return Visit(
        name=name,
        kind=one.kind,
        calls=one.calls,
        map=map_,
        coarsest=max(given, default=0),
        entry=max(taken, default=1),
        takes=one.takes,
        gives=one.gives,
        raises=bool(taken and given) and min(given) < min(taken),
        modified=modified,
        shape=one.first,
        given=one.given,
    )


def _fits(height: int, width: int, size: Size) -> bool:
    """Whether one stride, rounded either way, makes `size` into this grid."""
    low = max(size[0] / (height + 1), size[1] / (width + 1))
    high = min(
        size[0] / (height - 1) if height > 1 else float("inf"),
        size[1] / (width - 1) if width > 1 else float("inf"),
    )
    return low < high and max(height / size[0], width / size[1]) <= 4


def _skew(grid: Size, size: Size) -> float:
    """How far cells are from squares: 0 for squares."""
    ratio = (size[0] * grid[1]) / (size[1] * grid[0])
    return max(ratio, 1 / ratio) - 1


def _stride(grid: Size, size: Size) -> int:
    """Pixels per cell: the nearest power of two where it gives the grid to one cell (padding adds
    one), else the ratio of the longer sides."""
    off: dict[int, list[float]] = {
        power: [abs(n - m / power) for n, m in zip(grid, size, strict=True)]
        for power in (1 << exponent for exponent in range(max(size).bit_length()))
    }
    nearest: int = min(off, key=lambda power: sum(off[power]))
    if max(off[nearest]) <= 1:
        return nearest
    axis = 0 if size[0] >= size[1] else 1
    return max(1, round(size[axis] / grid[axis]))
