"""The photos on which artifacts differ most: photo, truth, every mask, and where they differ."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from srdeploy.imaging import Pixels, colour_table
from srdeploy.metrics import Interval, percent
from srdeploy.pages import charts
from srdeploy.pages.report import Picture, Report, Section, Table, Verdict, chart, drawing, photo
from srdeploy.serve.bench.report_tables import (
    Answer,
    accuracy_table,
    answers,
    artifact_names,
    checkpoint_table,
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
from srdeploy.serve.bench.results import Accuracy, BenchReport, Cell, Outcome
from srdeploy.spec import Spec

if TYPE_CHECKING:
    from srdeploy.serve.bench.accuracy import DifferingPhoto

MARK = np.array([230, 0, 126], np.uint8)
"""RGB of a pixel with two labels; no palette in common use has it beside gray."""
LONGEST = 640
"""Pixels; larger pictures are thinned for the page."""


def gallery(photos: Sequence["DifferingPhoto"], names: Sequence[str], spec: Spec) -> Section:
    """One row per photo; `names` are the artifacts' whose masks the photos carry, two or more.

    Below each mask stands its pixel accuracy on that photo.
    """
    first, second = names[:2]
    return Section(
        f"Where {second} and {first} differ most",
        text=(
            f"Photos by the share of pixels to which {second} gives another class than {first}; "
            "those pixels are marked in the last picture. Below each mask: its pixel accuracy."
        ),
        gallery_header=["photo", "truth", *names, "differing pixels"],
        gallery=[_row(one, spec) for one in photos],
        legend=[
            *(
                (name, f"rgb({red}, {green}, {blue})")
                for name, (red, green, blue) in zip(spec.classes, spec.palette, strict=True)
            ),
            ("differs", f"rgb({MARK[0]}, {MARK[1]}, {MARK[2]})"),
        ],
    )


def _row(one: "DifferingPhoto", spec: Spec) -> list[Picture]:
    table = colour_table(spec)
    step = -(-max(one.truth.shape) // LONGEST)
    thin = slice(None, None, step)
    masks = [
        drawing(table[mask[thin, thin]], f"{percent(_accuracy_text(mask, one.truth, spec))} %")
        for mask in one.masks
    ]
    marked = mark(one.photo, one.masks[0] != one.masks[1], step)
    return [
        photo(one.photo[thin, thin], one.name),
        drawing(table[one.truth[thin, thin]], "as drawn"),
        *masks,
        drawing(marked, f"{percent(one.differs)} % of pixels"),
    ]


def _accuracy_text(mask: Pixels, truth: Pixels, spec: Spec) -> float | None:
    valid = truth != spec.ignore_index
    return float((mask[valid] == truth[valid]).mean()) if valid.any() else None


def mark(image: Pixels, differs: npt.NDArray[np.bool_], step: int) -> Pixels:
    """The photo in pale gray, uint8 [h, w, 3], with a mark wherever one of the pixels that a shown
    one stands for differs: none is lost by thinning."""
    gray = image[::step, ::step].mean(axis=2, keepdims=True)
    pale = np.repeat((255 - (255 - gray) * 0.5).astype(np.uint8), 3, axis=2)
    rows = np.maximum.reduceat(differs, np.arange(0, differs.shape[0], step), axis=0)
    pale[np.maximum.reduceat(rows, np.arange(0, differs.shape[1], step), axis=1)] = MARK
    return pale


# A benchmark as a page: verdicts first, then every cell, the accuracy, the machine.

if TYPE_CHECKING:
    from srdeploy.serve.bench.accuracy import DifferingPhoto

CARDS = 8
"""Verdicts that stand at the top one by one; of more, those that are EQUIVALENT share a card."""
PASSED = {Outcome.EQUIVALENT: True, Outcome.DIFFERENT: False, Outcome.NOT_SHOWN: None}


def bench_page(
    report: BenchReport, photos: Sequence["DifferingPhoto"], spec: Spec | None
) -> Report:
    """The page's contents. photos: those on which the artifacts differ most, with one mask per row
    of the accuracy; spec: their classes and colours, needed where there are photos."""
    return Report(
        title="Benchmark: " + ", ".join(artifact_names(report)),
        lead=conditions(report),
        verdicts=bench_cards(report),
        sections=bench_sections(report, photos, spec),
        command=report.command,
        environment=report.environment,
        warnings=warnings(report),
    )


def bench_cards(report: BenchReport) -> list[Verdict]:
    """The verdicts: on latency, on exports against their checkpoints, and the gains of mIoU."""
    return [*_latency_cards(report), *_accuracy_cards(report)]


def bench_sections(
    report: BenchReport, photos: Sequence["DifferingPhoto"], spec: Spec | None
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
            sections.append(gallery(photos, [row.name for row in report.accuracy.rows], spec))
    if report.machine.figures:
        rows = [*report.machine.figures.items()]
        table = Table("While the latencies were measured", ("figure", "value"), rows, prose=True)
        sections.append(Section("Machine", tables=[table]))
    return sections


def _latency_cards(report: BenchReport) -> list[Verdict]:
    found = answers(report)
    several = len(report.cells) > 1
    if len(found) <= CARDS:
        return [_card(answer, several) for answer in found]
    same = [answer for answer in found if answer.verdict.outcome is Outcome.EQUIVALENT]
    cards = [_card(answer, several) for answer in found if answer not in same]
    if same:
        low = min(answer.ratio.low for answer in same)
        high = max(answer.ratio.high for answer in same)
        margins = sorted({margin_text(answer.verdict.margin) for answer in same})
        claim = (
            f"of {len(found)} verdicts on latency; intervals within {low:.3f} to {high:.3f}, "
            f"margins {', '.join(margins)}"
        )
        cards.insert(0, Verdict(claim, f"{len(same)} EQUIVALENT", True))
    return cards


def _card(answer: Answer, several: bool) -> Verdict:
    verdict = answer.verdict
    where = f"; {label(answer.cell)}" if several else ""
    return Verdict(
        f"ratio {answer.ratio}, margin {margin_text(verdict.margin)}: {answer.claim}{where}",
        verdict.outcome.value,
        PASSED[verdict.outcome],
        undecided=verdict.outcome is Outcome.NOT_SHOWN,
        detail=sentence(verdict.reason),
    )


def _accuracy_cards(report: BenchReport) -> list[Verdict]:
    if report.accuracy is None:
        return []
    cards = []
    first = report.accuracy.rows[0].name
    for row in report.accuracy.rows:
        if row.checkpoint is not None:
            share = f"{equal_labels(row.checkpoint.agreement)} % of labels are equal"
            claim = f"{share}: {row.name} against its own checkpoint"
            figure = "matches" if row.checkpoint.passed else "DIFFERS"
            cards.append(Verdict(claim, figure, row.checkpoint.passed))
    for row in report.accuracy.rows:
        if row.gains is not None and "miou" in row.gains:
            gain = row.gains["miou"]
            claim = f"points [95 %]: {points(gain)}, {row.name} over {first}"
            cards.append(Verdict(claim, f"{100 * gain.value:+.2f} mIoU", None))
    return cards


def _overview(report: BenchReport, anchors: Sequence[str], colours: Mapping[str, str]) -> Section:
    names = list(dict.fromkeys(row.name for cell in report.cells for row in cell.rows))
    medians: dict[str, list[float | None]] = {name: [] for name in names}
    for cell in report.cells:
        found = {row.name: row.end_to_end.quantiles.median.value for row in cell.rows}
        for name in names:
            medians[name].append(found.get(name))
    drawn = charts.dots([label(cell) for cell in report.cells], medians, "ms per run", colours)
    return Section(
        "All settings",
        tables=[overview_table(report, anchors)],
        key=_key(names, colours),
        charts=[chart(drawn, "Median latency end to end, by setting")],
    )


def _cell(cell: Cell, anchor: str, colours: Mapping[str, str]) -> list[Section]:
    """Tables and charts end to end; then, where it was measured, charts of the GPU's own time."""
    tables = (latency_table(cell), verdict_table(cell), cost_table(cell))
    key = _key([row.name for row in cell.rows], colours)
    found = [
        Section(
            f"Latency: {label(cell)}",
            text=sentence(design(cell)),
            tables=[table for table in tables if table is not None],
            charts=_latency_charts(cell, "end to end", colours),
            key=key,
            anchor=anchor,
        )
    ]
    if any(row.device_time is not None for row in cell.rows):
        drawn = _latency_charts(cell, "GPU", colours)
        title = f"The GPU's own time: {label(cell)}"
        found.append(Section(title, charts=drawn, key=key))
    return found


def _latency_charts(cell: Cell, measure: str, colours: Mapping[str, str]) -> list[Picture]:
    """Distribution and tail, ratios of each artifact, and all runs over time, for one measure."""
    timings = {row.name: timing for row, name, timing in measures(cell) if name == measure}
    samples = {name: np.concatenate(timing.rounds_ms) for name, timing in timings.items()}
    every = np.concatenate(list(samples.values()))
    beyond = int((every > 1.02 * np.quantile(every, 0.99)).sum())
    said = (
        f"; {beyond} of {len(every)} runs are slower than what is drawn here, and stand in the "
        "next chart"
    )
    drawn = [
        chart(
            charts.distributions(samples, "ms", colours),
            f"Distribution, {measure}{said if beyond else ''}",
        ),
        chart(
            charts.tails(samples, "ms", colours),
            f"Tail, {measure}: all runs down to the slowest of each",
        ),
        chart(
            charts.over_time({name: t.rounds_ms for name, t in timings.items()}, "ms", colours),
            f"Every run in the order measured, {measure}",
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
        said = (
            "no verdict was asked for"
            if verdict is None
            else f"{verdict.outcome.value}; shaded: the margin, {margin_text(verdict.margin)}"
        )
        drawn.append(
            chart(
                charts.ratios(found, f"ratio to {charts.plain(first)}"),
                f"{name} over {first}, {measure}: {said}. Each dot: one round, the first at the "
                "bottom; below them the 95 % interval",
            )
        )
    return drawn


def _ends(interval: Interval) -> tuple[float, float, float]:
    return interval.value, interval.low, interval.high


def _accuracy(accuracy: Accuracy, colours: Mapping[str, str]) -> Section:
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
    pictures = [chart(charts.lying_bars(classes, shares, "IoU, %", colours), "IoU per class")]
    if gains:
        drawn = charts.lying_bars(classes, gains, "IoU, points", colours)
        pictures.append(chart(drawn, f"IoU per class, difference to {names[0]}"))
    tables = (accuracy_table(accuracy), checkpoint_table(accuracy))
    return Section(
        "Accuracy",
        text=(
            "Failure-1: share of small objects that are missed. Failure-2: share of large objects' "
            "pixels that are given to another class. For both, less is better. Intervals are of "
            "the paired bootstrap over images: they are about these files, and another training "
            "would give other files."
        ),
        tables=[table for table in tables if table is not None],
        charts=pictures,
        key=_key(names, colours),
    )


def _hundredfold(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _key(names: Sequence[str], colours: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(name, colours[name]) for name in names]
