"""Sums of loss terms between two records, which cost the device no wait."""

import time

from torch import Tensor

from srdeploy.train.distributed import World


class Window:
    """Sums of the loss terms since the last record; they stay on the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._began = time.perf_counter()
        self._steps = 0

    def add(self, terms: dict[str, Tensor]) -> None:
        """One more step's terms."""
        self._steps += 1
        for name, term in terms.items():
            self._sums[name] = self._sums[name] + term if name in self._sums else term
            self._counts[name] = self._counts.get(name, 0) + 1

    def means(self, world: World) -> dict[str, float]:
        """Mean of every term over the steps in which it was there; the processes' parts add up."""
        rows = world.gather([float(total) for total in self._sums.values()])
        totals = [sum(parts) for parts in zip(*rows, strict=True)]
        return {
            name: total / self._counts[name] for name, total in zip(self._sums, totals, strict=True)
        }

    def rate(self) -> float:
        """Steps per second."""
        return self._steps / max(time.perf_counter() - self._began, 1e-9)
