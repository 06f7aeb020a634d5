"""Auxiliary heads of networks that others wrote: found by what they do, not by their names.

A head that only training needs (torchvision's aux_classifier, an mmseg-style auxiliary_head) does
not influence the main logits. So: run the network, ask which parameters the main logits depend on,
and the top-most modules without any such parameter are the ones that deployment can leave out.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from srdeploy.errors import UserError
from srdeploy.models.tracing import PROBE_SIZE, Size, blank, first_part, forward, trace, undisturbed


@dataclass(frozen=True)
class AuxiliaryHead:
    """A sub-module that the main logits do not depend on."""

    name: str
    parameters: int
    """Numbers in its parameters."""
    runs: bool
    """True if the head runs in a forward pass, in evaluation or in training."""
    classes: int | None
    """Channels of the map [N, K, h, w] it gives, where it runs and gives one."""


def find_auxiliary(network: nn.Module, size: Size = PROBE_SIZE) -> tuple[AuxiliaryHead, ...]:
    """The top-most sub-modules whose parameters all leave the main logits alone, in the network's
    order.

    Evaluation mode counts: it is what is deployed. Parameters that belong to a module beside such
    sub-modules (a mask token) are no heads. Nothing of the network changes. size: (H, W) of the
    probing image. Raises UserError where the network can't take it.
    """
    images = _noise(network, size)
    shown: dict[str, Any] = {}
    with undisturbed(network):
        needed = _parameters_that_count(network, images, shown)
        search = _Search(network, images, needed, shown)
        search.visit("", network)
    if all(head.runs for head in search.found):
        return tuple(search.found)
    return _seen_in_training(network, search.found, size)


def _seen_in_training(
    network: nn.Module, heads: list[AuxiliaryHead], size: Size
) -> tuple[AuxiliaryHead, ...]:
    """`heads`, those completed that only a forward in training mode runs."""
    try:
        visits = trace(network, size, training=True).visits
    except UserError:  # a training forward that asks for targets: nothing can be seen in it
        return tuple(heads)
    found = []
    for head in heads:
        ran = any(_within(name, head.name) for name in visits)
        shape = visits[head.name].shape if head.name in visits else None
        if ran and not head.runs:
            head = replace(head, runs=True, classes=shape[1] if shape and len(shape) == 4 else None)
        found.append(head)
    return tuple(found)


def remove_auxiliary(network: nn.Module, size: Size = PROBE_SIZE) -> tuple[str, ...]:
    """Removes the auxiliary heads in place and returns their names.

    A head becomes None where the network asks for it (`if self.aux is not None`), an entry of a
    ModuleDict is deleted, a list of heads is emptied, and a head that is called without asking
    becomes an `Absent`, whose output nobody reads. The main logits are bit for bit what they were.
    Raises UserError where the network can't run without one; it is then as it was.
    """
    names = tuple(head.name for head in find_auxiliary(network, size))
    if not names:
        return ()
    images = _noise(network, size)
    before = _logits(network, images)
    undo: list[Callable[[], None]] = []
    try:
        for name in names:
            _remove(network, name, images, before, undo)
    except UserError:
        for step in reversed(undo):
            step()
        raise
    return names


class Absent(nn.Module):
    """Stands where a removed head is called without asking: gives back what it takes first."""

    def forward(self, *given: Any, **named: Any) -> Any:
        return next(iter((*given, *named.values())), None)


class _Search:
    """Walks down the network to the top-most modules without influence."""

    def __init__(
        self, network: nn.Module, images: Tensor, needed: set[int], shown: dict[str, Any]
    ) -> None:
        self.network = network
        self.images = images
        self.needed = needed
        self.shown = shown
        self.found: list[AuxiliaryHead] = []
        self.known: set[int] = set()
        """Parameters of heads that were found: one may stand under a second name."""
        self.logits: Tensor | None = None

    def visit(self, name: str, module: nn.Module) -> None:
        parameters = list(module.parameters())
        if not parameters or self.known.issuperset(id(one) for one in parameters):
            return
        if not name or any(id(one) in self.needed for one in parameters) or self._matters(name):
            for key, child in module.named_children():
                self.visit(f"{name}.{key}" if name else key, child)
            return
        self.known.update(id(one) for one in parameters)
        given = first_part(self.shown.get(name))
        is_map = isinstance(given, Tensor) and given.dim() == 4
        self.found.append(
            AuxiliaryHead(
                name=name,
                parameters=sum(one.numel() for one in parameters),
                runs=bool(self._ran(name)),
                classes=given.shape[1] if is_map else None,
            )
        )

    def _ran(self, name: str) -> list[str]:
        return [one for one in self.shown if _within(one, name)]

    def _matters(self, name: str) -> bool:
        """Whether NaN in its outputs reaches the main logits. Gradients alone would not tell where
        a forward detaches, e.g. behind a frozen backbone."""
        ran = self._ran(name)
        if not ran or self.images.is_meta:
            return False
        with torch.no_grad():
            if self.logits is None:
                self.logits = forward(self.network, self.images)
            with ExitStack() as hooks:
                for one in ran:
                    module = self.network.get_submodule(one)
                    hooks.enter_context(module.register_forward_hook(_poisoned))
                try:
                    logits = forward(self.network, self.images)
                except UserError:
                    return True  # code that can't bear a NaN reads it
        return not torch.equal(logits, self.logits)


def _parameters_that_count(network: nn.Module, images: Tensor, shown: dict[str, Any]) -> set[int]:
    """Ids of the parameters that the main logits depend on; fills `shown` with what modules gave.

    By the graph that autograd records, without its gradients: a dead ReLU hides nothing, and a
    network that could not be trained (it overwrites what a gradient needs) can still be read.
    """
    parameters = [one for one in network.parameters() if one.is_floating_point()]
    frozen = [one for one in parameters if not one.requires_grad]
    try:
        for one in frozen:
            one.requires_grad_(True)
        with torch.enable_grad(), ExitStack() as hooks:
            for name, module in network.named_modules():
                hooks.enter_context(module.register_forward_hook(_Keep(shown, name)))
            logits = forward(network, images)
            return _leaves(logits)
    finally:
        for one in frozen:
            one.requires_grad_(False)


def _leaves(result: Tensor) -> set[int]:
    """Ids of the parameters that `result` was computed from, as autograd recorded it."""
    waiting, seen, found = [result.grad_fn], set(), set[int]()
    while waiting:
        step = waiting.pop()
        if step is None or step in seen:
            continue
        seen.add(step)
        variable = getattr(step, "variable", None)  # of a leaf's AccumulateGrad
        if variable is not None:
            found.add(id(variable))
        waiting += [before for before, _ in step.next_functions]
    return found


class _Keep:
    """A forward hook that keeps what the module gave."""

    def __init__(self, shown: dict[str, Any], name: str) -> None:
        self.shown = shown
        self.name = name

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.shown[self.name] = output


def _poisoned(module: nn.Module, args: Any, output: Any) -> Any:
    """A forward hook that puts NaN in place of the module's output."""
    if isinstance(output, Tensor):
        return torch.full_like(output, math.nan) if output.is_floating_point() else output
    if type(output) in (tuple, list):
        return type(output)(_poisoned(module, args, part) for part in output)
    if type(output) is dict:
        return {key: _poisoned(module, args, part) for key, part in output.items()}
    return output  # its inner modules are poisoned too


def _remove(
    network: nn.Module,
    name: str,
    images: Tensor,
    before: Tensor,
    undo: list[Callable[[], None]],
) -> None:
    """Takes the module out wherever it stands, in the first way that leaves the logits alone."""
    module = network.get_submodule(name)
    places = [
        (parent, key)
        for parent in network.modules()
        for key, child in parent._modules.items()
        if child is module
    ]
    reason = ""
    for stand_in in _stand_ins(module):
        held = [(parent, dict(parent._modules)) for parent, _ in places]
        for parent, key in places:
            if stand_in is None and isinstance(parent, nn.ModuleDict):
                del parent[key]
            else:
                parent._modules[key] = stand_in
        try:
            if torch.equal(_logits(network, images), before):
                undo.extend(_Restore(parent, modules) for parent, modules in held)
                return
            reason = "its main logits change"
        except UserError as error:
            cause = error.__cause__ or error
            reason = f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"
        for parent, modules in held:
            _Restore(parent, modules)()
    raise UserError(
        f"the network can't run without its auxiliary head '{name}': {reason}. Let its forward "
        f"leave the head out where it is None, or keep the auxiliary heads"
    )


def _stand_ins(module: nn.Module) -> list[nn.Module | None]:
    """The possible replacements of a removed module, in the order of trial."""
    if isinstance(module, nn.ModuleList):
        return [None, nn.ModuleList(), nn.ModuleList(Absent() for _ in module)]
    if isinstance(module, nn.ModuleDict):
        return [None, nn.ModuleDict(), nn.ModuleDict({key: Absent() for key in module})]
    return [None, Absent()]


class _Restore:
    """Puts a module's children back as they were, in their order."""

    def __init__(self, parent: nn.Module, modules: dict[str, nn.Module | None]) -> None:
        self.parent = parent
        self.modules = modules

    def __call__(self) -> None:
        self.parent._modules.clear()
        self.parent._modules.update(self.modules)


def _within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def _logits(network: nn.Module, images: Tensor) -> Tensor:
    with undisturbed(network), torch.no_grad():
        return forward(network, images)


def _noise(network: nn.Module, size: Size) -> Tensor:
    """The same random images every time: blank ones could hide an influence."""
    images = blank(network, size)
    if images.is_meta:
        return images
    drawn = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return drawn.to(images)
