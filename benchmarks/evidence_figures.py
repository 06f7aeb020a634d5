"""Evidence in figures: means over seeds, paired differences, a Markdown table, curves."""

from pathlib import Path
from typing import Any

import numpy as np
from evidence_variants import BASELINE
from intervals import interval, interval_text

from srdeploy.files import whole_file

MEASURES = {"miou": "mIoU", "failure1": "Failure-1", "failure2": "Failure-2"}
"""Titles by key of the scores; shares of 0..1, of which mIoU should be high, the others low."""

Found = dict[str, Any]


def summarised(records: list[Found]) -> Found:
    """{variant: {split: {measure: {"seeds", "mean", "difference"}}}} of one system's runs.

    mean, difference: [value, low, high], shares, over seeds; low and high are null with one seed.
    difference: from the baseline of the same seed, over the seeds that both have; null for the
    baseline, and where there is no such seed. A seed without a value (nothing to measure) is left
    out.
    """
    values: dict[str, dict[tuple[str, str], dict[int, float]]] = {}
    for record in records:
        of_variant = values.setdefault(record["variant"], {})
        for split, scores in record["scores"].items():
            for measure in MEASURES:
                by_seed = of_variant.setdefault((split, measure), {})
                if scores[measure] is not None:
                    by_seed[record["seed"]] = scores[measure]
    result: Found = {}
    for variant, cells in values.items():
        for (split, measure), by_seed in cells.items():
            against = values.get(BASELINE, {}).get((split, measure), {})
            shared = [seed for seed in by_seed if seed in against]
            paired = [by_seed[seed] - against[seed] for seed in shared]
            result.setdefault(variant, {}).setdefault(split, {})[measure] = {
                "seeds": sorted(by_seed),
                "mean": _interval(list(by_seed.values())),
                "difference": None if variant == BASELINE else _interval(paired),
            }
    return result


def _interval(values: list[float]) -> list[float | None] | None:
    if len(values) < 2:
        return [values[0], None, None] if values else None
    return list(interval(values))


def tables(figures: dict[str, Found], steps: int, splits: dict[str, str], left: int) -> str:
    """All systems' figures as Markdown, in percent."""
    lines = ["# Baseline against regulated, at equal budget", ""]
    lines += [
        f"{steps} steps a run; weights chosen by mIoU on {splits['val']}, which is therefore "
        f"flattered; {splits['test']} is not. Figures in percent, with 95 % t intervals over "
        "seeds; differences are from the baseline of the same seed, in points. mIoU should rise, "
        "failures fall. Each interval stands for itself: of many, one in twenty misses by chance.",
    ]
    if left:
        lines += ["", f"**{left} runs are left: the same command goes on.**"]
    for system, found in figures.items():
        for split in splits:
            titles = [f"{title}{part}" for title in MEASURES.values() for part in ("", ", diff.")]
            lines += ["", f"## {system}, {splits[split]}", ""]
            lines += [f"| variant | seeds | {' | '.join(titles)} |", "|---" * 8 + "|"]
            for variant, by_split in found.items():
                cells = by_split[split]
                count = len(cells["miou"]["seeds"])
                texts = []
                for measure in MEASURES:
                    texts += [_text(cells[measure]["mean"])]
                    texts += [_text(cells[measure]["difference"], signed=True)]
                lines.append(f"| {variant} | {count} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def _text(found: list[float | None] | None, signed: bool = False) -> str:
    """'mean (low to high)' in percent; a dash for None."""
    if found is None:
        return "-"
    sign = "+" if signed else ""
    shares = [100 * one for one in found if one is not None]
    return f"{shares[0]:{sign}.2f}" if len(shares) == 1 else interval_text(shares, sign=sign)


MOST_BANDS = 6
"""Variants whose range over seeds is drawn."""


def save_curves(path: Path, title: str, curves: dict[str, list[list[list[float]]]]) -> None:
    """Writes a PNG: mIoU on the selecting split over steps, a line per variant, which is the mean
    over seeds, in a band from the lowest to the highest seed where there are few.

    curves: {variant: [run: [[step, mIoU], ...]]}; variants without a run are left out.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    shown = {variant: runs for variant, runs in curves.items() if runs}
    bands = len(shown) <= MOST_BANDS  # more of them hide each other
    palette = colormaps["tab10" if bands else "tab20"]
    for number, (variant, runs) in enumerate(shown.items()):
        colour = palette(number % palette.N)
        points = np.array(runs, np.float64)  # [run, validation, (step, mIoU)]
        steps, miou = points[0, :, 0], 100 * points[:, :, 1]
        style = "--" if variant == BASELINE else "-"
        label = f"{variant} ({len(runs)})"
        axes.plot(steps, miou.mean(0), style, marker=".", color=colour, label=label)
        if bands:
            axes.fill_between(steps, miou.min(0), miou.max(0), color=colour, alpha=0.12, lw=0)
    over = "mean and range" if bands else "mean"
    axes.set(title=f"{title}: {over} over seeds", xlabel="step")
    axes.set(ylabel="mIoU on the selecting split, %")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    figure.legend(title="variant (seeds)", loc="outside right center")
    with whole_file(path) as part:
        figure.savefig(part, format="png", dpi=110)
