"""What became of the tags: report.json, a contact sheet, and the page of the worst pseudo masks."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import torch

from srdeploy import console
from srdeploy.data.tags import TaggedSet
from srdeploy.files import write_json, write_whole
from srdeploy.imaging import Pixels, encode_png, overlay, read_labels, restore
from srdeploy.pages import report as page
from srdeploy.spec import Spec
from srdeploy.train.pictures import grid, shrink, spread
from srdeploy.train.weak.decide import MapScores, mean_iou, read_scores
from srdeploy.train.weak.maps import PhotoMaps, at_size, read_maps, refined
from srdeploy.train.weak.mirror import Mirror, read_fitted
from srdeploy.train.weak.pseudo_run import MAPS, REPORT, SCORES, PseudoRun

SHEET = "contact-sheet.png"
WORST = "worst.html"
SHEET_ROWS = 12
WORST_ROWS = 24
OPACITY = 0.75
"""Of a class's colour where its map is 1."""


@dataclass(frozen=True)
class PseudoResult:
    """One photo's pseudo mask, judged."""

    tagged: TaggedSet
    index: int
    ignored: float
    """Share of its pixels, 0..1."""
    scores: MapScores | None

    def badness(self, spec: Spec) -> float:
        """High where the mask is bad: by its mIoU where there is a true mask, else by what it
        ignores."""
        if self.scores is None:
            return self.ignored
        found = mean_iou(self.scores.mask, spec)
        return 1.0 if found is None else 1 - found


def write_report(
    run: PseudoRun,
    sets: Sequence[TaggedSet],
    spec: Spec,
    mirror: Mirror,
    home: Path,
    before: dict[str, Any],
) -> None:
    """Sums up and draws what the masks' step left. before: what the report held already; sets: the
    splits that have pseudo masks, training first."""
    report = dict(before)
    report["background"] = run.pseudo.background
    report["certain"] = run.pseudo.certain
    report["refine"] = run.pseudo.refine
    outcomes = [
        _outcome(tagged, index, spec, mirror, home)
        for tagged in sets
        for index in console.track(range(len(tagged)), f"judging {tagged.split}", len(tagged))
    ]
    report["splits"] = {
        tagged.split: _split_report([o for o in outcomes if o.tagged is tagged], spec)
        for tagged in sets
    }
    training = [one for one in outcomes if one.tagged is sets[0]]
    _write_sheet(run, training, spec, mirror, home)
    worst = sorted(outcomes, key=lambda one: one.badness(spec), reverse=True)[:WORST_ROWS]
    write_whole(home / WORST, page.render(_worst_page(run, report, worst, spec, mirror, home)))
    write_json(home / REPORT, report)
    for split, found in report["splits"].items():
        console.done(f"{split}: {_in_words(found)}")
        better = found.get("best_background")
        if better and better["miou"] > found["refined"]["miou"]:
            console.say(
                f"  by the true masks pseudo.background={better['level']} would be best: "
                f"{_percent(better['miou'])} refined"
            )


def _outcome(tagged: TaggedSet, index: int, spec: Spec, mirror: Mirror, home: Path) -> PseudoResult:
    item = tagged.items[index]
    labels = _labels(mirror, tagged, index)
    scores = home / SCORES / f"{mirror.key(item)}.npz"
    return PseudoResult(
        tagged,
        index,
        float((labels == spec.ignore_index).mean()),
        read_scores(scores) if tagged.has_masks else None,
    )


def _split_report(outcomes: Sequence[PseudoResult], spec: Spec) -> dict[str, Any]:
    found: dict[str, Any] = {
        "images": len(outcomes),
        "ignored": float(np.mean([one.ignored for one in outcomes])),
        "tags_per_image": float(np.mean([len(o.tagged.tags[o.index]) for o in outcomes])),
    }
    scored = [one.scores for one in outcomes if one.scores is not None]
    if scored:
        found |= reduce(add, scored).summary(spec)
    return found


def _in_words(found: dict[str, Any]) -> str:
    text = f"{found['images']} pseudo masks, {100 * found['ignored']:.1f} % of the pixels ignored"
    if "cam" not in found:
        return text
    return (
        f"{text}; mIoU {_percent(found['cam']['miou'])} of the maps, "
        f"{_percent(found['refined']['miou'])} refined, {_percent(found['mask']['miou'])} of the "
        "masks where they are sure"
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


def _tinted(photo: Pixels, found: PhotoMaps, spec: Spec, background: int) -> Pixels:
    """The photo with each class's colour as strong as its map; uint8 [H, W, 3]."""
    kept = [i for i, one in enumerate(found.classes) if one != background]
    if not kept:
        return photo
    maps = found.maps[kept]
    colours = np.array([spec.palette[found.classes[i]] for i in kept], np.float32)
    strength = OPACITY * maps.max(0)[..., None]
    mixed = photo * (1 - strength) + colours[maps.argmax(0)] * strength
    tinted: Pixels = mixed.round().clip(0, 255).astype(np.uint8)
    return tinted


def _views(
    run: PseudoRun, one: PseudoResult, spec: Spec, mirror: Mirror, home: Path
) -> dict[str, Pixels]:
    """Pictures of a photo, by caption."""
    tagged, item = one.tagged, one.tagged.items[one.index]
    photo, _ = read_fitted(tagged, one.index, spec)
    cam = read_maps(home / MAPS / f"{mirror.key(item)}.npz")
    (fine,) = refined([photo], [cam], tagged.background, run.pseudo, torch.device("cpu"))
    here = (photo.shape[0], photo.shape[1])
    mask = restore(_labels(mirror, tagged, one.index), *here)
    views = {
        "photo": photo,
        "class maps": _tinted(photo, at_size(cam, here), spec, tagged.background),
        "refined": _tinted(photo, fine, spec, tagged.background),
        "pseudo mask": overlay(photo, mask, spec, opacity=0.7),
    }
    if tagged.has_masks:
        views["truth"] = overlay(photo, restore(tagged.mask(one.index), *here), spec, opacity=0.7)
    return views


def _labels(mirror: Mirror, tagged: TaggedSet, index: int) -> Pixels:
    """The pseudo mask of one photo as labels, uint8 [H, W]."""
    table = np.array(tagged.lookup, np.int16).clip(0).astype(np.uint8)
    labels: Pixels = table[read_labels(mirror.mask(tagged.items[index]))]
    return labels


def _write_sheet(
    run: PseudoRun, outcomes: Sequence[PseudoResult], spec: Spec, mirror: Mirror, home: Path
) -> None:
    rows, captions = [], ["photo"]
    for place in spread(len(outcomes), SHEET_ROWS):
        views = _views(run, outcomes[place], spec, mirror, home)
        captions = list(views)
        rows.append([shrink(view) for view in views.values()])
    write_whole(home / SHEET, encode_png(grid(rows, captions, spec)))


def _worst_page(
    run: PseudoRun,
    report: dict[str, Any],
    worst: Sequence[PseudoResult],
    spec: Spec,
    mirror: Mirror,
    home: Path,
) -> page.Report:
    gallery, header = [], []
    shown: set[int] = set()
    for one in worst:
        views = _views(run, one, spec, mirror, home)
        item, tags = one.tagged.items[one.index], sorted(one.tagged.tags[one.index])
        names = ", ".join(spec.classes[tag] for tag in tags) or "no tag"
        figure = f"{100 * one.ignored:.0f} % ignored"
        if one.scores is not None:
            figure = f"mIoU {_percent(mean_iou(one.scores.mask, spec))}, {figure}"
        first = f"{one.tagged.split}/{item.name}: {names}; {figure}"
        header = list(views)
        gallery.append(
            [page.photo(view, first if name == "photo" else name) for name, view in views.items()]
        )
        shown |= {one.tagged.background, *tags}
    scored = worst[0].scores is not None
    legend = page.Legend([(spec.classes[i], page.css(spec.palette[i])) for i in sorted(shown)])
    order = "lowest mIoU of the pseudo mask" if scored else "largest share of ignored pixels"
    return page.Report(
        title="Where pseudo masks are worst",
        lead=(
            f"The {len(worst)} photos with the {order} first. Class maps are what the classifier "
            "points at, refined ones follow the photo's edges; a colour is as strong as the map. "
            "Uncoloured pixels of a pseudo mask are ignored in training."
        ),
        verdicts=_figures(report),
        sections=[
            page.Section("Splits", blocks=[_table(report)]),
            page.Section("Photos", blocks=[legend, page.Gallery(header, gallery)]),
        ],
        command=f"srdeploy pseudo {run.classifier.data} --out {mirror.folder}",
    )


def _table(report: dict[str, Any]) -> page.Table:
    rows = []
    for split, found in report["splits"].items():
        scored = "cam" in found
        rows.append(
            (
                split,
                str(found["images"]),
                _percent(found["ignored"]),
                *(
                    _percent(found[name]["miou"]) if scored else "-"
                    for name in ("cam", "refined", "mask")
                ),
            )
        )
    header = ("split", "photos", "ignored %", "class maps", "refined", "pseudo masks")
    return page.Table("Pseudo masks by split; the last three columns are mIoU, %", header, rows)


def _figures(report: dict[str, Any]) -> list[page.Verdict]:
    """The training split's figures, large."""
    found = next(iter(report["splits"].values()))
    figures = [page.Verdict("of the pixels are ignored", f"{_percent(found['ignored'])} %", None)]
    if "cam" in found:
        names = {"cam": "of the class maps", "refined": "refined", "mask": "where masks are sure"}
        figures = [
            *(
                page.Verdict(f"mIoU {text}", _percent(found[name]["miou"]), None)
                for name, text in names.items()
            ),
            *figures,
        ]
    return figures
