"""How a converted graph differs from its reference, as a page."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from srdeploy.environment import describe_environment
from srdeploy.export.certificate import Line
from srdeploy.export.comparison import PrecisionLimits
from srdeploy.export.differences import UNTYPED, Difference, MaskScores, Pair, part_text, share_text
from srdeploy.export.layer_errors import LayerError, explain_jump, first_jump, nodes_to_keep
from srdeploy.imaging import colour_table
from srdeploy.pages import charts
from srdeploy.pages.report import (
    DIFFERENT,
    Bar,
    Bars,
    Block,
    Charts,
    Code,
    Gallery,
    Picture,
    Report,
    Section,
    Table,
    Text,
    Verdict,
    chart,
    class_legend,
    css,
    drawing,
    mark_differences,
    photo,
    write_report,
)
from srdeploy.precision import Precision
from srdeploy.spec import Spec

PHOTOS = 4
"""The number of photos shown: those that differ most."""
_MARKS = {True: "✓", False: "✗", None: "-"}
"""The last: recorded, not judged."""


@dataclass(frozen=True)
class Findings:
    """What verification found."""

    line: Line
    summary: str
    """The line's detail, without what its end says of layers."""
    precision: Precision
    limits: PrecisionLimits
    spec: Spec
    found: tuple[Difference, ...]
    worst: Difference
    """The way of running that differs most: its photos and classes are shown."""
    layers: Sequence[LayerError]
    where: str
    """What is said of layers where there are none to look at."""
    files: tuple[int, int]
    """Bytes of the reference's file and of the candidate's."""


def write_difference_page(findings: Findings, path: Path) -> None:
    """Writes the page to `path` in one step. Raises UserError where that fails."""
    write_report(_page(findings), path)


def _page(findings: Findings) -> Report:
    spec, worst = findings.spec, findings.worst
    before, after = (size / 1e6 for size in findings.files)
    name = findings.line.figures["candidate"]
    reason = Text(f"Why these limits: {findings.limits.reason}.", soft=True)
    return Report(
        title=f"{findings.precision} against float32",
        lead=(
            f"{name}, {after:.2f} MB, compared with the certified float32 graph, {before:.2f} MB. "
            f"Shown below: {worst.computed_by}."
        ),
        verdicts=[*_verdicts(findings)],
        sections=[
            Section("Limits", findings.summary, [_needed(findings), reason]),
            Section(
                "Where both differ most",
                "The photos with the fewest equal labels, both masks, and the photo in gray with "
                "the pixels that differ. A picture opens large.",
                [
                    class_legend(spec, ("differs", DIFFERENT)),
                    _photos(worst.pairs, findings.precision, spec),
                ],
            ),
            Section("Classes", _classes_text(worst), [Bars([*_classes(worst, spec)])]),
            _layers(findings),
            Section("Batches", blocks=[_cases(findings)]),
        ],
        environment=describe_environment(),
    )


def _verdicts(findings: Findings) -> Iterator[Verdict]:
    worst, passed = findings.worst, bool(findings.line.passed)
    yield Verdict(
        f"{findings.precision} is within its limits" if passed else "a limit is exceeded",
        "verified" if passed else "not verified",
        passed,
    )
    enough = worst.counted >= findings.limits.agreement
    yield Verdict("of pixels have the same label", share_text(worst.counted), enough)
    if worst.finite is not None:
        figure = "all finite" if worst.finite else "NaN or infinity"
        yield Verdict("logits in every batch", figure, worst.finite)
    if worst.against_masks is not None:
        gain = 100 * worst.against_masks.gain
        exceeds = worst.against_masks.exceeds(findings.limits.miou_loss)
        kept = None if exceeds is None else not exceeds
        yield Verdict(f"points of mIoU{_error(worst.against_masks)}", f"{gain:+.2f}", kept)


def _needed(findings: Findings) -> Table:
    """What would have passed, beside what was needed."""
    worst, limits = findings.worst, findings.limits
    rows = [
        _share_row("equal labels, usual size, all photos", worst.counted, limits.agreement),
        _share_row("equal labels, worst batch at any size", worst.least, limits.least),
    ]
    difference = worst.relative_difference
    if difference is not None:
        limit = limits.logits
        judged = None if limit is None else difference <= limit
        rows.append(
            (
                "largest logit difference, of the largest logit",
                part_text(difference),
                "-" if limit is None else f"≤ {part_text(limit)}",
                _MARKS[judged],
            )
        )
    if worst.against_masks is not None:
        gain, exceeds = worst.against_masks.gain, worst.against_masks.exceeds(limits.miou_loss)
        rows.append(
            (
                f"mIoU lost, points{_error(worst.against_masks)}",
                f"{max(0.0, -100 * gain):.2f}",
                f"≤ {100 * limits.miou_loss:.2f}",
                _MARKS[None if exceeds is None else not exceeds],
            )
        )
    return Table("Tolerance that would have passed", ("", "would pass", "limit", ""), rows)


def _error(scores: MaskScores) -> str:
    return "" if scores.error is None else f" (standard error {100 * scores.error:.2f})"


def _share_row(name: str, share: float, limit: float) -> tuple[str, str, str, str]:
    return name, share_text(share), f"≥ {share_text(limit)}", _MARKS[share >= limit]


def _cases(findings: Findings) -> Table:
    rows = []
    for one in findings.found:
        for case in one.cases:
            count, height, width = case.shape
            difference = case.relative_difference
            rows.append(
                (
                    case.size,
                    f"{count} × {height} × {width}",
                    share_text(case.counted),
                    share_text(case.least),
                    "NaN"
                    if case.finite is False
                    else "-"
                    if difference is None
                    else part_text(difference),
                    _MARKS[case.passed],
                    case.computed_by,
                )
            )
    header = ("size", "N × H × W", "equal labels", "needed", "logit difference", "", "computed by")
    return Table("Largest logit difference as a share of the largest logit", header, rows, True)


def _classes_text(worst: Difference) -> str:
    if worst.against_masks is None:
        return (
            "IoU of the two predictions, over the photos at the usual size: 100 % where both see "
            "the same pixels."
        )
    return (
        "IoU against the true masks, over the photos at the usual size: float32 above, converted "
        "below, and how many points the conversion changes it by."
    )


def _classes(worst: Difference, spec: Spec) -> Iterator[Bar]:
    per_class = None if worst.against_masks is None else worst.against_masks.per_class
    colours = dict(zip(spec.classes, map(css, spec.palette), strict=True))
    for name, share in worst.iou.items():
        if per_class is None:
            if share is not None:
                both = [("both", 100 * share, charts.COLOURS[0])]
                yield Bar(name, share_text(share), both, colours[name])
            continue
        pair = per_class.get(name, (None, None))
        if pair != (None, None):
            left, right = (100 * (value or 0.0) for value in pair)
            shares = [("float32", left, charts.COLOURS[0]), ("new", right, charts.COLOURS[1])]
            yield Bar(name, f"{right - left:+.2f}", shares, colours[name])


def _photos(pairs: Sequence[Pair], precision: str, spec: Spec) -> Gallery:
    table = colour_table(spec)
    order = sorted(range(len(pairs)), key=lambda index: pairs[index].agreement)
    rows: list[list[Picture]] = []
    titles = []
    for index in order[:PHOTOS]:
        pair = pairs[index]
        differs = pair.reference != pair.candidate
        title = f"Photo {index + 1}: {share_text(pair.agreement)} of labels are equal"
        titles.append(title)
        count = f"{int(differs.sum())} pixels differ"
        rows.append(
            [
                photo(pair.photo, "", f"{title}: photo"),
                drawing(table[pair.reference], "", f"{title}: float32"),
                drawing(table[pair.candidate], "", f"{title}: {precision}"),
                drawing(mark_differences(pair.photo, differs), count, f"{title}: {count}"),
            ]
        )
    return Gallery(["photo", "float32", precision, "differing pixels"], rows, titles)


def _layers(findings: Findings) -> Section:
    layers, rounding = findings.layers, findings.limits.rounding
    where = explain_jump(layers, rounding, False) if layers else findings.where
    blocks: list[Block] = []
    if layers and not findings.line.passed and findings.precision not in UNTYPED:
        keep = nodes_to_keep(layers, rounding)
        if keep:
            blocks.append(Text("To keep in float32 what adds most, convert with:"))
            blocks.append(Code(" ".join(f"--keep '{one}'" for one in keep)))
    if layers:
        first = first_jump(layers, rounding)
        mark = None if first is None else (list(layers).index(first), first.node)
        errors = [one.error for one in layers]
        drawn = chart(
            "Error of each layer's output, relative to float32",
            charts.levels,
            errors,
            mark,
            "layer, in the order of computing",
            "relative error",
        )
        blocks.append(Charts([drawn]))
    return Section("Layers", f"{where[:1].upper()}{where[1:]}.", blocks)
