"""How a converted graph differs from its reference, as one self-contained HTML page: light and
dark, phone and desk, no external resources."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from srdeploy.environment import describe_environment
from srdeploy.export.certificate import Line
from srdeploy.export.comparison import PrecisionLimits
from srdeploy.export.differences import UNTYPED, Difference, MaskScores, Pair, part_text, share_text
from srdeploy.export.layer_errors import LayerError, explain_jump, first_jump, nodes_to_keep
from srdeploy.files import write_whole
from srdeploy.imaging import Pixels, colour_table
from srdeploy.pages import charts
from srdeploy.pages.report import Picture, Table, Verdict, chart, drawing, photo, render_page
from srdeploy.precision import Precision
from srdeploy.spec import Colour, Spec

PHOTOS = 4
"""As many are shown, those that differ most."""
DIFFERENT: Colour = (225, 0, 152)
"""Of pixels whose labels differ, on a grey photo."""

_GREY_STEP = 17
"""Between the grey photo's levels: sixteen of them make small files."""
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


@dataclass(frozen=True)
class Bar:
    """A share in percent."""

    label: str
    percent: float
    colour: str


@dataclass(frozen=True)
class ClassRow:
    """One class and its IoU."""

    name: str
    colour: str
    bars: tuple[Bar, ...]
    figure: str


@dataclass(frozen=True)
class PhotoRow:
    """One photo, both masks and where they differ."""

    title: str
    pictures: tuple[Picture, ...]
    width: int
    height: int


@dataclass(frozen=True)
class Page:
    """What the template shows."""

    title: str
    lead: str
    detail: str
    verdicts: tuple[Verdict, ...]
    needed: Table
    reason: str
    cases: Table
    classes_text: str
    classes: tuple[ClassRow, ...]
    photos: tuple[PhotoRow, ...]
    legend: tuple[tuple[str, str], ...]
    where: str
    layers: Picture | None
    flags: str
    """To convert with; empty where there is nothing to mend."""
    different: str = ""
    environment: dict[str, str] = field(default_factory=describe_environment)


def write_difference_page(findings: Findings, path: Path) -> None:
    """Writes the page to `path` in one step. Raises UserError where that fails."""
    write_whole(path, render_page("srdeploy.pages", "differences.html", page=_page(findings)))


def difference_picture(pair: Pair) -> Pixels:
    """The photo in pale grey, with the pixels whose labels differ in one strong colour; uint8
    [H, W, 3]."""
    grey = pair.photo.mean(2) / 2 + 110  # pale: the colour must be what one sees
    levels = (grey // _GREY_STEP * _GREY_STEP).astype(np.uint8)
    picture = np.repeat(levels[:, :, None], 3, axis=2)
    picture[pair.reference != pair.candidate] = DIFFERENT
    return picture


def _page(findings: Findings) -> Page:
    spec, worst = findings.spec, findings.worst
    before, after = (size / 1e6 for size in findings.files)
    name = findings.line.figures["candidate"]
    layers, keep = findings.layers, []
    if not findings.line.passed and findings.precision not in UNTYPED and layers:
        keep = nodes_to_keep(layers, findings.limits.rounding)
    return Page(
        title=f"{findings.precision} against float32",
        lead=(
            f"{name}, {after:.2f} MB, compared with the certified float32 graph, {before:.2f} MB. "
            f"Shown below: {worst.computed_by}."
        ),
        detail=findings.summary,
        verdicts=tuple(_verdicts(findings)),
        needed=_needed(findings),
        reason=f"Why these limits: {findings.limits.reason}.",
        cases=_cases(findings),
        classes_text=_classes_text(worst),
        classes=tuple(_classes(worst, spec)),
        photos=tuple(_photos(worst.pairs, findings.precision, spec)),
        legend=tuple(
            (one, _css(colour)) for one, colour in zip(spec.classes, spec.palette, strict=True)
        ),
        where=explain_jump(layers, findings.limits.rounding, False) if layers else findings.where,
        layers=_layer_chart(findings),
        flags=" ".join(f"--keep '{one}'" for one in keep),
        different=_css(DIFFERENT),
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


def _classes(worst: Difference, spec: Spec) -> Iterator[ClassRow]:
    per_class = None if worst.against_masks is None else worst.against_masks.per_class
    colours = dict(zip(spec.classes, map(_css, spec.palette), strict=True))
    for name, share in worst.iou.items():
        if per_class is None:
            if share is not None:
                bar = Bar("both", 100 * share, charts.COLOURS[0])
                yield ClassRow(name, colours[name], (bar,), share_text(share))
            continue
        pair = per_class.get(name, (None, None))
        if pair != (None, None):
            left, right = (100 * (value or 0.0) for value in pair)
            bars = (Bar("float32", left, charts.COLOURS[0]), Bar("new", right, charts.COLOURS[1]))
            yield ClassRow(name, colours[name], bars, f"{right - left:+.2f}")


def _photos(pairs: Sequence[Pair], precision: str, spec: Spec) -> Iterator[PhotoRow]:
    table = colour_table(spec)
    order = sorted(range(len(pairs)), key=lambda index: pairs[index].agreement)
    for index in order[:PHOTOS]:
        pair = pairs[index]
        count = int((pair.reference != pair.candidate).sum())
        title = f"Photo {index + 1}: {share_text(pair.agreement)} of labels are equal"
        yield PhotoRow(
            title=title,
            pictures=(
                photo(pair.photo, "photo"),
                drawing(table[pair.reference], "float32"),
                drawing(table[pair.candidate], precision),
                drawing(difference_picture(pair), f"{count} pixels differ"),
            ),
            width=pair.photo.shape[1],
            height=pair.photo.shape[0],
        )


def _layer_chart(findings: Findings) -> Picture | None:
    layers = findings.layers
    if not layers:
        return None
    first = first_jump(layers, findings.limits.rounding)
    mark = None if first is None else (list(layers).index(first), first.node)
    svg = charts.levels(
        [one.error for one in layers], mark, "layer, in the order of computing", "relative error"
    )
    return chart(svg, "Error of each layer's output, relative to float32")


def _css(colour: Colour) -> str:
    return f"rgb({colour[0]}, {colour[1]}, {colour[2]})"
