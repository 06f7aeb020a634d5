"""A benchmark as a page: verdicts first, then every cell, the accuracy and the machine."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from srdeploy.imaging import Pixels, colour_table
from srdeploy.metrics import Interval, percent
from srdeploy.pages import charts
from srdeploy.pages.report import (
    DIFFERENT,
    Block,
    Charts,
    Gallery,
    Legend,
    Picture,
    Report,
    Section,
    Table,
    Verdict,
    chart,
    class_legend,
    drawing,
    mark_differences,
    photo,
)
from srdeploy.serve.bench.results import AccuracyResult, BenchReport, Cell, LatencyOutcome
from srdeploy.serve.bench.tables import (
    LatencyComparison,
    accuracy_table,
    artifact_names,
    checkpoint_table,
    comparisons,
    conditions,
    cost_table,
    design,
    equal_labels,
    label,
    latency_table,
    margin_text,
    measures,
    overview_table,
    points,
    sentence,
    verdict_table,
    warnings,
)
from srdeploy.spec import Spec

if TYPE_CHECKING:
    from srdeploy.serve.bench.accuracy import DifferingPhoto

CARDS = 8
"""Verdicts that have cards of their own; if there are more, the EQUIVALENT ones share a card."""
PASSED = {
    LatencyOutcome.EQUIVALENT: True,
    LatencyOutcome.DIFFERENT: False,
    LatencyOutcome.NOT_SHOWN: None,
}
LONGEST = 640
"""Pixels; larger pictures are thinned for the page."""


def bench_page(
    report: BenchReport, photos: Sequence["DifferingPhoto"] = (), spec: Spec | None = None
) -> Report:
    """The page's contents. photos: those on which the artifacts differ most, with one mask per row
    of the accuracy; spec: their classes and colours, needed where there are photos."""
    return Report(
        title="Benchmark: " + ", ".join(artifact_names(report)),
        lead=conditions(report),
        verdicts=bench_verdicts(report),
        sections=bench_sections(report, photos, spec),
        command=report.command,
        environment=report.environment,
        warnings=warnings(report),
    )


def bench_verdicts(report: BenchReport) -> list[Verdict]:
    """The verdicts: on latency, on exports against their checkpoints, and the gains of mIoU."""
    return [*_latency_verdicts(report), *_accuracy_verdicts(report)]


def bench_sections(
    report: BenchReport, photos: Sequence["DifferingPhoto"] = (), spec: Spec | None = None
) -> list[Section]:
    """Overview of several settings, each setting, accuracy, photos, machine; as in bench_page."""
    colours = {
        name: charts.COLOURS[index % len(charts.COLOURS)]
        for index, name in enumerate(artifact_names(report))
    }
    anchors = [f"setting-{index + 1}" for index in range(len(report.cells))]
    sections = []
    if len(report.cells) > 1:
        sections.append(_overview(report, anchors, colours))
    for cell, anchor in zip(report.cells, anchors, strict=True):
        sections += _cell(cell, anchor, colours)
    if report.accuracy is not None:
        sections.append(_accuracy(report.accuracy, colours))
        if photos:
            assert spec is not None
            names = [row.name for row in report.accuracy.rows]
            sections.append(gallery_section(photos, names, spec))
    if report.machine.figures:
        rows = [*report.machine.figures.items()]
        table = Table("While the latencies were measured", ("figure", "value"), rows, prose=True)
        sections.append(Section("Machine", blocks=[table]))
    return sections


def _latency_verdicts(report: BenchReport) -> list[Verdict]:
    found = comparisons(report)
    several = len(report.cells) > 1
    if len(found) <= CARDS:
        return [_latency_verdict(one, several) for one in found]
    same = [one for one in found if one.verdict.outcome is LatencyOutcome.EQUIVALENT]
    verdicts = [_latency_verdict(one, several) for one in found if one not in same]
    if same:
        low = min(one.ratio.low for one in same)
        high = max(one.ratio.high for one in same)
        margins = sorted({margin_text(one.verdict.margin) for one in same})
        claim = (
            f"of {len(found)} verdicts on latency; intervals within {low:.3f} to {high:.3f}, "
            f"margins {', '.join(margins)}"
        )
        verdicts.insert(0, Verdict(claim, f"{len(same)} EQUIVALENT", True))
    return verdicts


def _latency_verdict(one: LatencyComparison, several: bool) -> Verdict:
    outcome, margin = one.verdict.outcome, margin_text(one.verdict.margin)
    where = f"; {label(one.cell)}" if several else ""
    return Verdict(
        f"ratio {one.ratio}, margin {margin}: {one.claim}{where}",
        outcome.value,
        PASSED[outcome],
        undecided=outcome is LatencyOutcome.NOT_SHOWN,
        detail=sentence(one.verdict.reason),
    )


def _accuracy_verdicts(report: BenchReport) -> list[Verdict]:
    if report.accuracy is None:
        return []
    verdicts = []
    first = report.accuracy.rows[0].name
    for row in report.accuracy.rows:
        if row.checkpoint is not None:
            share = f"{equal_labels(row.checkpoint.agreement)} % of labels are equal"
            claim = f"{share}: {row.name} against its own checkpoint"
            figure = "matches" if row.checkpoint.passed else "DIFFERS"
            verdicts.append(Verdict(claim, figure, row.checkpoint.passed))
    for row in report.accuracy.rows:
        if row.gains is not None and "miou" in row.gains:
            gain = row.gains["miou"]
            claim = f"points [95 %]: {points(gain)}, {row.name} over {first}"
            verdicts.append(Verdict(claim, f"{100 * gain.value:+.2f} mIoU", None))
    return verdicts


def _overview(report: BenchReport, anchors: Sequence[str], colours: Mapping[str, str]) -> Section:
    names = list(dict.fromkeys(row.name for cell in report.cells for row in cell.rows))
    medians: dict[str, list[float | None]] = {name: [] for name in names}
    for cell in report.cells:
        found = {row.name: row.end_to_end.quantiles.median.value for row in cell.rows}
        for name in names:
            medians[name].append(found.get(name))
    settings = [label(cell) for cell in report.cells]
    drawn = chart(
        "Median latency end to end, by setting",
        charts.dots,
        settings,
        medians,
        "ms per run",
        colours,
    )
    blocks: list[Block] = [overview_table(report, anchors), _key(names, colours), Charts([drawn])]
    return Section("All settings", blocks=blocks)


def _cell(cell: Cell, anchor: str, colours: Mapping[str, str]) -> list[Section]:
    """Tables and charts end to end; then, where it was measured, charts of the GPU's own time."""
    tables = [latency_table(cell), verdict_table(cell), cost_table(cell)]
    blocks: list[Block] = [table for table in tables if table is not None]
    key = _key([row.name for row in cell.rows], colours)
    blocks += [key, _latency_charts(cell, "end to end", colours)]
    found = [Section(f"Latency: {label(cell)}", sentence(design(cell)), blocks, anchor)]
    if any(row.device_time is not None for row in cell.rows):
        title = f"The GPU's own time: {label(cell)}"
        found.append(Section(title, blocks=[key, _latency_charts(cell, "GPU", colours)]))
    return found


def _latency_charts(cell: Cell, measure: str, colours: Mapping[str, str]) -> Charts:
    """Distribution and tail, ratios of each artifact, and all runs over time, for one measure."""
    timings = {row.name: timing for row, name, timing in measures(cell) if name == measure}
    samples = {name: np.concatenate(timing.rounds_ms) for name, timing in timings.items()}
    every = np.concatenate(list(samples.values()))
    beyond = int((every > 1.02 * np.quantile(every, 0.99)).sum())
    slower = f"; {beyond} of {len(every)} runs are slower than this chart shows, see the next one"
    by_round = {name: timing.rounds_ms for name, timing in timings.items()}
    drawn = [
        chart(
            f"Distribution, {measure}{slower if beyond else ''}",
            charts.distributions,
            samples,
            "ms",
            colours,
        ),
        chart(
            f"Tail, {measure}: all runs down to the slowest of each",
            charts.tails,
            samples,
            "ms",
            colours,
        ),
        chart(
            f"Every run in the order measured, {measure}",
            charts.over_time,
            by_round,
            "ms",
            colours,
        ),
    ]
    floor, floor_rounds = (
        (cell.floor, cell.floor_rounds)
        if measure == "end to end"
        else (cell.device_floor, cell.device_floor_rounds)
    )
    first = cell.rows[0].name
    for name, timing in timings.items():
        if timing.ratio is None or floor is None:
            continue
        verdict = timing.verdict
        found = charts.Ratios(
            timing.round_ratios,
            _ends(timing.ratio),
            _ends(floor),
            floor_rounds,
            None if verdict is None else verdict.margin,
            colours[name],
        )
        outcome = (
            "no verdict was asked for"
            if verdict is None
            else f"{verdict.outcome.value}; shaded: the margin, {margin_text(verdict.margin)}"
        )
        caption = (
            f"{name} over {first}, {measure}: {outcome}. Each dot: one round, the first at the "
            "bottom; below them the 95 % interval"
        )
        drawn.append(chart(caption, charts.ratios, found, f"ratio to {charts.plain(first)}"))
    return Charts(drawn)


def _ends(interval: Interval) -> tuple[float, float, float]:
    return interval.value, interval.low, interval.high


def _accuracy(accuracy: AccuracyResult, colours: Mapping[str, str]) -> Section:
    classes = list(accuracy.rows[0].scores.iou)
    names = [row.name for row in accuracy.rows]
    shares = {row.name: [_hundredfold(row.scores.iou[c]) for c in classes] for row in accuracy.rows}
    gains = {
        name: [
            None if mine is None or base is None else mine - base
            for mine, base in zip(shares[name], shares[names[0]], strict=True)
        ]
        for name in names[1:]
    }
    drawn = [chart("IoU per class", charts.bars, classes, shares, "IoU, %", colours)]
    if gains:
        caption = f"IoU per class, difference to {names[0]}"
        drawn.append(chart(caption, charts.bars, classes, gains, "IoU, points", colours))
    tables = [accuracy_table(accuracy), checkpoint_table(accuracy)]
    blocks: list[Block] = [table for table in tables if table is not None]
    return Section(
        "Accuracy",
        "Failure-1: share of small objects that are missed. Failure-2: share of large objects' "
        "pixels that are given to another class. For both, less is better. Intervals are of the "
        "paired bootstrap over images: they are about these files, and another training would give "
        "other files.",
        [*blocks, _key(names, colours), Charts(drawn)],
    )


def _hundredfold(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _key(names: Sequence[str], colours: Mapping[str, str]) -> Legend:
    return Legend([(name, colours[name]) for name in names])


def gallery_section(
    photos: Sequence["DifferingPhoto"], names: Sequence[str], spec: Spec
) -> Section:
    """The photos on which artifacts differ most, one row each; `names` are the artifacts' whose
    masks the photos carry, two or more.

    Below each mask is its pixel accuracy on that photo.
    """
    first, second = names[:2]
    return Section(
        f"Where {second} and {first} differ most",
        f"Photos by the share of pixels to which {second} gives another class than {first}; those "
        "pixels are marked in the last picture. Below each mask: its pixel accuracy.",
        [
            class_legend(spec, ("differs", DIFFERENT)),
            Gallery(
                ["photo", "truth", *names, "differing pixels"], [_row(one, spec) for one in photos]
            ),
        ],
    )


def _row(one: "DifferingPhoto", spec: Spec) -> list[Picture]:
    table = colour_table(spec)
    step = -(-max(one.truth.shape) // LONGEST)
    thin = slice(None, None, step)
    masks = [
        drawing(table[mask[thin, thin]], accuracy_text(mask, one.truth, spec)) for mask in one.masks
    ]
    marked = mark_differences(one.photo, one.masks[0] != one.masks[1], step)
    return [
        photo(one.photo[thin, thin], one.name),
        drawing(table[one.truth[thin, thin]], "as drawn"),
        *masks,
        drawing(marked, f"{percent(one.differs)} % of pixels"),
    ]


def accuracy_text(mask: Pixels, truth: Pixels, spec: Spec) -> str:
    """A mask's pixel accuracy in percent."""
    valid = truth != spec.ignore_index
    share = float((mask[valid] == truth[valid]).mean()) if valid.any() else None
    return f"{percent(share)} %"
