"""Figures over rounds, with how far they can be trusted."""

from typing import Any

import numpy as np
from scipy import stats


def interval(values: Any) -> list[float]:
    """[mean, low, high]: 95 % over rounds, by the t distribution. values: two or more."""
    mean = float(np.mean(values))
    half = float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))
    return [mean, mean - half, mean + half]


def interval_text(found: list[float] | None, digits: int = 2, sign: str = "") -> str:
    """mean (low to high); empty for None. sign: "+" where positive numbers are to have theirs."""
    if found is None:
        return ""
    mean, low, high = (f"{one:{sign}.{digits}f}" for one in found)
    return f"{mean} ({low} to {high})"
