"""Which maps of an unknown network exits should read: one per level of its encoder.

The rule works on the trace of one forward, in four steps:

1. *Units.* The network is cut into modules that follow each other. A module is cut further where
   two or more coarser grids arise inside it (a backbone), and stays whole otherwise (a layer, a
   block). One that gives back the grid it took is cut only where it goes down and up again and has
   no sibling of its kind: a U-Net in a wrapper is cut, the stacks of an hourglass are stages.
2. *The encoder* ends at the bottleneck, the last unit at the coarsest stride before maps grow, and
   before the part of the network that makes the logits.
3. *Levels.* Each stride gives its last map before the network continues with the next. Several
   stages at one stride (a dilated ResNet's layer2, layer3 and layer4) give one each; a stage is a
   unit that holds two or more blocks of one kind, each giving a map of the unit's own shape, or an
   hourglass. A unit that gives maps on several grids (HRNet's) counts by its coarsest, and is read
   at its first.
4. *Constant stride.* Where that gives fewer than three maps, as in a vision transformer, the
   longest row of blocks of one kind gives four that are evenly spread.

Left out are auxiliary heads, modules that run several times, and modules whose output is
overwritten in place later: by the time an exit reads it, it would be another map.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypeVar

from srdeploy.models.tracing import FeatureMap, Trace, Visit

T = TypeVar("T")

MOST_TAPS = 6
_SPREAD = 4
_ENOUGH = 3
_WITHOUT_EFFECT = ("Dropout", "Dropout2d", "Identity", "DropPath")


@dataclass(frozen=True)
class Level:
    """A map for an exit to read, and why."""

    map: FeatureMap
    reason: str


def encoder_levels(trace: Trace, left_out: Collection[str] = ()) -> tuple[Level, ...]:
    """The maps to read, shallow to deep; empty where there are none but the logits.

    left_out: names of modules to leave out, with all that is in them.
    """
    tree = _Tree(trace, left_out)
    if not any(tree.visits):
        return ()  # a network without sub-modules
    maker = tree.logits_maker()
    units = _before_logits(tree, _units(tree, ""), maker)
    if not units:
        return ()
    units, end = _encoder(tree, units, maker)
    found: list[Level] = []
    runs = _last_runs(tree, units)
    for position, (stride, run) in enumerate(runs):
        last = position == len(runs) - 1
        after = end if last else f"before the network goes to {runs[position + 1][0]}"
        found += _of_run(tree, stride, run, after)
    if len(found) < _ENOUGH:
        spread = _spread_blocks(tree, units)
        if spread:
            finer = [one for one in found if one.map.stride < spread[0].map.stride]
            found = [*finer, *spread]
    return tuple(_evenly(found, MOST_TAPS))


class _Tree:
    """The modules that ran, as a tree; containers that only hold modules are looked through."""

    def __init__(self, trace: Trace, left_out: Collection[str]) -> None:
        self.visits = {
            name: visit
            for name, visit in trace.visits.items()
            if not any(_within(name, part) for part in left_out)
        }
        self.classes = trace.logits[1]
        self.children: dict[str, list[str]] = {name: [] for name in ("", *self.visits)}
        for name in self.visits:
            if name:
                self.children[self.parent(name)].append(name)

    def parent(self, name: str) -> str:
        while name:
            name = name.rpartition(".")[0]
            if name in self.visits:
                return name
        return ""

    def logits_maker(self) -> str:
        """The module that makes the logits: the last innermost one that gives K channels."""
        innermost = [name for name in self.visits if name and not self.children[name]]
        makers = [
            name
            for name in innermost
            for map_ in [self.visits[name].map]
            if map_ is not None and map_.channels == self.classes
        ]
        return (makers or innermost)[-1]

    def below(self, name: str) -> list[Visit]:
        """All modules inside `name` that ran."""
        return [visit for one, visit in self.visits.items() if one != name and _within(one, name)]

    def stride(self, name: str) -> int:
        """The level of a unit: its map's stride, of several maps' the coarsest."""
        visit = self.visits[name]
        if visit.gives > 1:
            return visit.coarsest
        return visit.map.stride if _is_map(visit) and visit.map is not None else 0

    def readable(self, name: str) -> FeatureMap | None:
        """Its map, where exits can read it."""
        visit = self.visits[name]
        return visit.map if _is_map(visit) and not visit.modified else None

    def is_stage(self, name: str) -> bool:
        """Whether it holds two or more blocks of one kind, or goes down two levels and back."""
        given = self.visits[name].shape
        children = [self.visits[child] for child in self.children[name] if self.children[child]]
        blocks = Counter(child.kind for child in children if child.shape == given)
        return max(blocks.values(), default=0) >= 2 or len(self.coarser(name)) >= 2

    def is_pooled(self, name: str) -> bool:
        """Whether an adaptive pool sets its grid: a summary (PSPNet's pyramid), no level."""
        visit = self.visits[name]
        return any(
            one.kind.startswith("Adaptive") and one.map.grid == visit.map.grid
            for one in (visit, *self.below(name))
            if one.map is not None and visit.map is not None
        )

    def coarser(self, name: str) -> set[int]:
        """The strides inside a module that are coarser than what it took."""
        strides = {one.map.stride for one in self.below(name) if one.map and _is_map(one)}
        return {stride for stride in strides if stride > self.visits[name].entry}


def _units(tree: _Tree, name: str) -> list[str]:
    """The modules that follow each other in `name`, in the order in which they finish."""
    if name and tree.visits[name].calls > 1:
        return []
    if not name or _is_cut(tree, name):
        return [unit for child in tree.children[name] for unit in _units(tree, child)]
    apart = tree.visits[name].kind in _WITHOUT_EFFECT or tree.is_pooled(name)
    return [name] if tree.stride(name) and not apart else []


def _is_cut(tree: _Tree, name: str) -> bool:
    visit = tree.visits[name]
    if not tree.children[name] or min(visit.takes, visit.gives) > 1:
        return False  # branches on several grids run side by side
    if visit.map is None:
        return True
    coarser = tree.coarser(name)
    if len(coarser) < 2:
        return False
    if tree.stride(name) > visit.entry:
        return True
    parent = tree.parent(name)
    alone = sum(tree.visits[one].kind == visit.kind for one in tree.children[parent]) == 1
    return alone and {2 * visit.entry, 4 * visit.entry} <= coarser


def _before_logits(tree: _Tree, units: list[str], maker: str) -> list[str]:
    """The units before the module that makes the logits, and before the part that holds it."""
    order = {name: position for position, name in enumerate(tree.visits)}
    tops = [one for one in units if _within(maker, one)]
    end = order[tops[0]] if tops else order[maker]
    units = [one for one in units if order[one] < end]
    if not units:
        return []
    # A head that was cut into units goes as a whole.
    coarsest = max(units, key=tree.stride)
    head = _part(maker, apart_from=(units[0], coarsest))
    return [one for one in units if not _within(one, head)]


def _encoder(tree: _Tree, units: list[str], maker: str) -> tuple[list[str], str]:
    """`units` up to the bottleneck, and what comes after it, in words."""
    for position, one in enumerate(units):
        visit = tree.visits[one]
        if position and visit.gives > 1 and visit.raises:  # a neck makes a pyramid from one grid
            return units[:position], f"before maps grow again: the decoder begins at {one}"
    strides = [tree.stride(one) for one in units]
    coarsest = max(strides)
    start = strides.index(coarsest)
    stop = next((i for i in range(start, len(units)) if strides[i] < coarsest), len(units))
    if stop < len(units):
        end = f"before maps grow again: the decoder begins at {units[stop]}"
    else:
        end = f"before the head, which holds {maker}"
    bottom = units[start:stop]
    parts = [_part(one, apart_from=(maker,)) for one in bottom]
    parts = ["" if part == one else part for part, one in zip(parts, bottom, strict=True)]
    modules = Counter[str]()
    for part, one in zip(parts, bottom, strict=True):
        modules[part] += 1 + len(tree.below(one))
    main = modules.most_common(1)[0][0]
    if main:  # what follows the part with most of the modules is a neck or a head
        last = max(i for i, part in enumerate(parts) if part == main)
        if last + 1 < len(bottom):
            end = f"before the head, which begins at {bottom[last + 1]}"
        bottom = bottom[: last + 1]
    return [*units[:start], *bottom], end


def _part(name: str, apart_from: Sequence[str]) -> str:
    """The largest module that holds `name` and none of `apart_from`."""
    steps = name.split(".")
    for length in range(1, len(steps)):
        part = ".".join(steps[:length])
        if not any(_within(other, part) for other in apart_from):
            return part
    return name


def _last_runs(tree: _Tree, units: Sequence[str]) -> list[tuple[int, list[str]]]:
    """(stride, units) for each stride: the last row of units that stay at it; finest first.

    The last, since a network with two paths goes down twice: the path to the bottleneck counts.
    """
    runs: dict[int, list[str]] = {}
    before = 0
    for one in units:
        stride = tree.stride(one)
        if stride != before:
            runs[stride] = []
        runs[stride].append(one)
        before = stride
    return sorted(runs.items())


def _of_run(tree: _Tree, stride: int, run: Sequence[str], after: str) -> list[Level]:
    """The maps of one level, in the order in which they were made."""
    clean = [one for one in run if tree.readable(one) is not None]
    stages = [one for one in clean if tree.is_stage(one)]
    if len(stages) < 2:
        chosen = clean[-1:]
        if chosen and not tree.children[chosen[0]]:  # a stage rather than the norm behind it
            chosen = stages or chosen
        return [_level(tree, one, f"the last map at stride {stride}, {after}") for one in chosen]
    chosen = _evenly(stages, _SPREAD)
    return [
        _level(tree, one, f"stage {stages.index(one) + 1} of {len(stages)} at stride {stride}")
        for one in chosen
    ]


def _spread_blocks(tree: _Tree, units: Sequence[str]) -> list[Level]:
    """Four of the longest row of blocks of one kind and one grid in the encoder."""
    best: list[str] = []
    for name, children in tree.children.items():
        if not any(_within(name, unit) or _within(unit, name) for unit in units):
            continue
        rows: dict[tuple[object, ...], list[str]] = {}
        for child in children:
            map_ = tree.readable(child)
            inside = any(_within(child, unit) for unit in units)
            if map_ is not None and inside and tree.children[child]:
                key = (map_.kind, map_.grid, child.rpartition(".")[0])
                rows.setdefault(key, []).append(child)
        best = max([best, *rows.values()], key=len)
    if len(best) < _SPREAD:
        return []
    return [
        _level(tree, one, f"block {best.index(one) + 1} of {len(best)} of one kind at one stride")
        for one in (best[(i + 1) * len(best) // _SPREAD - 1] for i in range(_SPREAD))
    ]


def _level(tree: _Tree, name: str, why: str) -> Level:
    map_ = tree.readable(name)
    assert map_ is not None
    return Level(map_, f"{name} ({map_.kind}): {why}")


def _evenly(values: Sequence[T], count: int) -> list[T]:
    """At most `count` of `values`, evenly spread, the first and the last among them."""
    if len(values) <= count:
        return list(values)
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


def _is_map(visit: Visit) -> bool:
    """Ran once and gave a map; a single cell is a pooled vector and no map."""
    return visit.calls == 1 and visit.map is not None and visit.map.grid != (1, 1)


def _within(name: str, part: str) -> bool:
    return not part or name == part or name.startswith(f"{part}.")
