"""A benchmark's tables: the page, the Markdown text and the terminal show these alike. A line break
in a cell parts an estimate from its interval."""

from collections.abc import Sequence

from srdeploy.metrics import percent
from srdeploy.serve.bench.contents import (
    MARKS,
    MATCHES,
    broken,
    equal_labels,
    label,
    margin_text,
    measures,
    milliseconds,
    points,
    ratio_text,
    sentence,
    ways,
)
from srdeploy.serve.bench.results import Accuracy, BenchReport, Cell, Footprint
from srdeploy.serve.report import Table

GAINS = (("miou", "mIoU"), ("failure1", "Failure-1"), ("failure2", "Failure-2"))
"""Keys of AccuracyRow.gains with their names, in the tables' order."""


def latency_table(cell: Cell) -> Table:
    """Quantiles with intervals, ratio and throughput; one row per artifact and measure. What all
    rows have in common stands in the caption."""
    several = len({measure for _, measure, _ in measures(cell)}) > 1
    common = {ways(row) for row in cell.rows}
    rows = []
    for row, measure, timing in measures(cell):
        spans = timing.quantiles
        quantiles = (spans.median, spans.p90, spans.p95, spans.p99)
        rows.append(
            (
                row.name,
                *((measure,) if several else ()),
                *((ways(row).replace(", ", "\n", 1),) if len(common) > 1 else ()),
                *(broken(one, milliseconds(spans.median.value)) for one in quantiles),
                ratio_text(timing.ratio),
                f"{row.images_per_s:.1f}" if measure == "end to end" else "-",
            )
        )
    where = f"; {common.pop()}" if len(common) == 1 else ""
    return Table(
        f"Milliseconds per run of {cell.batch}, with 95 % intervals{where}",
        (
            "artifact",
            *(("measure",) if several else ()),
            *(("runs in",) if len(common) > 1 else ()),
            *("median", "p90", "p95", "p99", "ratio [95 %]", "images/s"),
        ),
        rows,
    )


def verdict_table(cell: Cell) -> Table | None:
    """Every verdict with its reason; None where the cell has none."""
    rows = []
    for row, measure, timing in measures(cell):
        verdict = timing.verdict
        if verdict is None:
            continue
        rows.append(
            (
                f"{row.name}, {measure}",
                MARKS[verdict.outcome],
                ratio_text(timing.ratio),
                margin_text(verdict.margin),
                f"{verdict.p_equivalent:.2g}",
                f"{verdict.p_different:.2g}",
                "-" if verdict.rounds_needed is None else str(verdict.rounds_needed),
                sentence(verdict.reason),
            )
        )
    if not rows:
        return None
    header = ("artifact", "verdict", "ratio [95 %]", "margin", "p within", "p beyond")
    return Table(
        f"Two one-sided tests against {cell.rows[0].name}",
        (*header, "rounds needed", "reason"),
        rows,
        prose=True,
    )


def cost_table(cell: Cell) -> Table:
    """What each artifact costs apart from its latency."""
    return Table(
        "Cost. Memory is the peak of a fresh process: its own part, and with all libraries",
        (
            "artifact",
            "file, MB",
            "parameters",
            "GMACs",
            "own MiB",
            "all MiB",
            "GPU MiB",
            "import, s",
            "first labels, s",
        ),
        [
            (
                row.name,
                f"{row.file_bytes / 1e6:.2f}",
                f"{row.parameters:,}",
                "-" if row.gmacs is None else f"{row.gmacs:.2f}",
                *_footprint(row.footprint),
            )
            for row in cell.rows
        ],
    )


def _footprint(found: Footprint | None) -> tuple[str, str, str, str, str]:
    if found is None:
        return ("-", "-", "-", "-", "-")
    return (
        f"{found.own_mib:.0f}",
        f"{found.peak_mib:.0f}",
        "-" if found.device_mib is None else f"{found.device_mib:.0f}",
        f"{found.import_s:.2f}",
        f"{found.first_inference_s:.2f}",
    )


def accuracy_table(accuracy: Accuracy) -> Table:
    """Scores in percent, and below each its gain over the first artifact with the interval."""
    rows = []
    for row in accuracy.rows:
        scores, gains = row.scores, row.gains or {}
        cells = [
            percent(share) + (f"\n{points(gains[key])}" if key in gains else "")
            for (key, _), share in zip(
                GAINS, (scores.miou, scores.failure1, scores.failure2), strict=True
            )
        ]
        agreement = percent(row.agreement)
        rows.append((row.name, *cells, percent(row.scores.pixel_accuracy), agreement))
    return Table(
        f"{accuracy.data} ({accuracy.split}), {accuracy.images} images; percent, and below it the "
        "difference to the first in points [95 %]",
        ("artifact", *(name for _, name in GAINS), "pixel accuracy", "labels as the first"),
        rows,
    )


def checkpoint_table(accuracy: Accuracy) -> Table | None:
    """Exports against the checkpoints that they were made from; None where none is known."""
    rows = [
        (
            row.name,
            MATCHES[row.checkpoint.passed],
            equal_labels(row.checkpoint.agreement),
            f"{100 * row.checkpoint.miou_difference:+.4f}",
            row.checkpoint.checkpoint,
        )
        for row in accuracy.rows
        if row.checkpoint is not None
    ]
    if not rows:
        return None
    header = ("artifact", "verdict", "equal labels, %", "mIoU, points", "checkpoint")
    return Table("Exports against their own checkpoints", header, rows, prose=True)


def overview_table(report: BenchReport, anchors: Sequence[str] = ()) -> Table:
    """One row per setting and artifact: median end to end, ratio, verdicts of all measures. A
    setting stands in its first row.

    anchors: one per cell, for links.
    """
    rows = []
    links: list[str] = []
    for index, cell in enumerate(report.cells):
        for place, row in enumerate(cell.rows):
            verdicts = [
                ("" if measure == "end to end" else f"{measure} ") + MARKS[timing.verdict.outcome]
                for measure, timing in row.timings.items()
                if timing.verdict is not None
            ]
            median = row.end_to_end.quantiles.median.value
            rows.append(
                (
                    label(cell) if place == 0 else "",
                    row.name,
                    format(median, milliseconds(median)),
                    ratio_text(row.end_to_end.ratio).replace("\n", " "),
                    "\n".join(verdicts) or "-",
                    f"{row.images_per_s:.1f}",
                )
            )
            if anchors:
                links.append(anchors[index] if place == 0 else "")
    header = ("setting", "artifact", "median ms", "ratio [95 %]", "verdict", "images/s")
    return Table("Latency end to end", header, rows, links=links)
