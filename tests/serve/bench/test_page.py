"""The benchmark's page: verdicts on top, everything drawn, readable wherever it is opened."""

import re
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import srdeploy.serve.bench.page as page_module
from srdeploy.pages.report import (
    DIFFERENT,
    Gallery,
    Legend,
    Picture,
    Report,
    Table,
    render,
    write_report,
)
from srdeploy.serve.bench.accuracy import DifferingPhoto
from srdeploy.serve.bench.page import bench_page, gallery_section
from srdeploy.serve.bench.results import BenchReport, MachineReport
from srdeploy.spec import Spec

Factory = Callable[..., BenchReport]
NASTY = ("base|line", "<b>regulated</b> $x$", "exits & [left] in")


class Contents(HTMLParser):
    """What a page asks for from elsewhere, its pictures' texts, its links and their ends."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.pictures: list[str] = []
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        for name in ("src", "srcset", "data"):
            if not values.get(name, "data:").startswith("data:"):
                self.outside.append(f"{tag} {name}={values[name]}")
        if "href" in values:
            self.links.add(values["href"])
        if tag == "img":
            self.pictures.append(values["alt"])
        if "id" in values:
            self.anchors.add("#" + values["id"])


@pytest.fixture(scope="module")
def photos() -> list[DifferingPhoto]:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (40, 48, 3)).astype(np.uint8)
    truth = np.zeros((40, 48), np.uint8)
    truth[0] = 255
    other = truth.copy()
    other[10:20, 12:24] = 2
    return [DifferingPhoto(f"photo {i}", image, truth, (truth, other), 0.0625) for i in range(2)]


@pytest.fixture(scope="module")
def page(bench_report: BenchReport, photos: list[DifferingPhoto], tiny_spec: Spec) -> Report:
    return bench_page(bench_report, photos, tiny_spec)


@pytest.fixture(scope="module")
def text(page: Report) -> str:
    return render(page)


def cells_of(page: Report) -> list[str]:
    """Every cell of every table."""
    return [
        cell
        for section in page.sections
        for table in section.blocks
        if isinstance(table, Table)
        for row in table.rows
        for cell in row
    ]


def test_each_outcome_has_a_mark_of_its_own(text: str) -> None:
    found = re.findall(r'<li class="(\w+)"><b>([^<]+)</b>', text)
    assert found == [
        ("passed", "EQUIVALENT"),
        ("undecided", "NOT SHOWN"),
        ("failed", "DIFFERENT"),
        ("failed", "DIFFERS"),
        ("passed", "matches"),
        ("figure", "+1.23 mIoU"),
    ]


def test_verdicts_carry_ratio_margin_and_reason(bench_report: BenchReport, page: Report) -> None:
    asked = [
        timing
        for cell in bench_report.cells
        for row in cell.rows
        for timing in row.timings.values()
        if timing.verdict is not None
    ]
    cards = {card.detail: card.claim for card in page.verdicts if card.detail}
    assert len(cards) == len(asked) == 3
    for timing in asked:
        assert timing.verdict is not None
        reason = timing.verdict.reason
        claim = cards[f"{reason[0].upper()}{reason[1:]}."]
        assert f"ratio {timing.ratio}, margin {100 * timing.verdict.margin:.3g} %" in claim


def test_every_interval_stands_in_a_table(bench_report: BenchReport, page: Report) -> None:
    cells = cells_of(page)
    for cell in bench_report.cells:
        for row in cell.rows:
            for timing in row.timings.values():
                spans = timing.quantiles
                form = ".2f" if spans.median.value >= 10 else ".3f"
                for span in (spans.median, spans.p90, spans.p95, spans.p99):
                    assert f"{span.value:{form}}\n[{span.low:{form}}, {span.high:{form}}]" in cells
    assert "73.41\n+1.23 [+0.51, +1.98]" in [
        cell for cell in cells if cell.endswith("+1.23 [+0.51, +1.98]")
    ]


def test_warnings_stand_before_the_verdicts(text: str) -> None:
    start, end = text.index('<aside class="warnings">'), text.index('<ul class="verdicts')
    assert start < end
    for part in ("powersave", "never became steady while warming up: exits left in"):
        assert part in text[start:end]


def test_without_warnings_there_is_no_box(make_report: Factory) -> None:
    cell = make_report().cells[0]
    rows = tuple(row.model_copy(update={"settled": True}) for row in cell.rows[:2])
    quiet = make_report(
        cells=(cell.model_copy(update={"rows": rows}),),
        accuracy=None,
        machine=MachineReport(figures={}, warnings=()),
    )
    assert '<aside class="warnings">' not in render(bench_page(quiet, [], None))


def test_the_command_and_the_environment_are_there(bench_report: BenchReport, text: str) -> None:
    assert f"<pre>{bench_report.command}</pre>" in text
    for name, value in bench_report.environment.items():
        assert f"<dt>{name}</dt><dd>{value}</dd>" in text


def test_charts_and_pictures_of_every_measure_are_drawn(text: str) -> None:
    drawn = Contents(text).pictures
    for measure in ("end to end", "GPU"):
        for start in (f"Distribution, {measure}", f"Tail, {measure}", "Every run in the order"):
            assert any(one.startswith(start) for one in drawn)
        for name in ("regulated", "exits left in"):
            assert any(one.startswith(f"{name} over baseline, {measure}") for one in drawn)
    assert {"IoU per class", "photo 0", "photo 1", "6.25 % of pixels"} <= {*drawn}


def test_a_chart_that_ends_before_the_slowest_runs_says_how_many_are_missing(
    bench_report: BenchReport, text: str
) -> None:
    timings = [row.end_to_end for row in bench_report.cells[0].rows]
    runs = np.array([timing.rounds_ms for timing in timings]).ravel()
    beyond = (runs > 1.02 * np.quantile(runs, 0.99)).sum()
    assert beyond > 0
    assert f"{beyond} of {len(runs)} runs are slower than this chart shows" in text


def test_an_artifact_has_one_colour_on_the_whole_page(page: Report) -> None:
    keys = {
        entry
        for section in page.sections
        if not section.title.startswith("Where")
        for block in section.blocks
        if isinstance(block, Legend)
        for entry in block.entries
    }
    assert len(keys) == len({name for name, _ in keys}) == len({colour for _, colour in keys}) == 3


def test_masks_stand_above_their_accuracy_and_differing_pixels_are_marked(
    photos: list[DifferingPhoto], tiny_spec: Spec
) -> None:
    legend, gallery = gallery_section(photos, ["a", "b"], tiny_spec).blocks
    assert isinstance(legend, Legend)
    assert legend.entries[-1] == ("differs", "rgb({}, {}, {})".format(*DIFFERENT))
    assert isinstance(gallery, Gallery)
    captions = [one.caption for one in gallery.rows[0] if isinstance(one, Picture)]
    assert captions == ["photo 0", "as drawn", "100.00 %", "93.59 %", "6.25 % of pixels"]


def test_names_are_text_and_never_markup(make_report: Factory) -> None:
    report = make_report(names=NASTY, classes=("a$b$", "<i>c</i>", "d&e"))
    first = report.model_copy(update={"cells": report.cells[:1]})
    shown = render(bench_page(first, [], None))
    assert "<b>regulated" not in shown
    assert "<i>c" not in shown
    assert NASTY[1] in unescape(shown)


def test_the_page_asks_for_nothing_from_elsewhere(text: str) -> None:
    assert Contents(text).outside == []
    assert "url(" not in text


def test_a_single_artifact_has_no_verdict_and_no_ratio(make_report: Factory) -> None:
    report = make_report()
    cell, accuracy = report.cells[0], report.accuracy
    assert accuracy is not None
    alone = report.model_copy(
        update={
            "cells": (cell.model_copy(update={"rows": cell.rows[:1]}),),
            "accuracy": accuracy.model_copy(update={"rows": accuracy.rows[:1]}),
        }
    )
    page = bench_page(alone, [], None)
    assert [card.figure for card in page.verdicts] == ["DIFFERS"]
    drawn = Contents(render(page)).pictures
    assert not [one for one in drawn if "over baseline" in one or "difference to" in one]
    assert [section.title for section in page.sections] == [
        "Latency: onnxruntime, batch 1, 360x480",
        "Accuracy",
        "Machine",
    ]


def test_of_many_verdicts_the_equivalent_share_a_card(
    make_report: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_module, "CARDS", 3)
    cpu, gpu = make_report().cells
    cell = cpu.model_copy(update={"rows": cpu.rows[:2]})
    cells = [cell.model_copy(update={"batch": batch}) for batch in (1, 2)]
    page = bench_page(make_report(cells=(*cells, gpu), accuracy=None), [], None)
    found = [(card.figure, card.state) for card in page.verdicts]
    assert found == [
        ("2 EQUIVALENT", "passed"),
        ("NOT SHOWN", "undecided"),
        ("DIFFERENT", "failed"),
    ]
    assert "of 4 verdicts" in page.verdicts[0].claim


def test_several_settings_begin_with_an_overview_that_leads_to_each(
    page: Report, text: str
) -> None:
    assert page.sections[0].title == "All settings"
    table = page.sections[0].blocks[0]
    assert isinstance(table, Table)
    assert [row[:2] for row in table.rows] == [
        ("onnxruntime, batch 1, 360x480", "baseline"),
        ("", "regulated"),
        ("", "exits left in"),
        ("tensorrt, fp16, batch 8, 360x480", "baseline"),
        ("", "regulated"),
        ("", "exits left in"),
    ]
    assert table.rows[4][4] == "? NOT SHOWN\nGPU ✗ DIFFERENT"
    found = Contents(text)
    assert found.links == {"#setting-1", "#setting-2"} == found.anchors


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_browser_shows_it_all_without_sideways_scrolling(
    page: Report, tmp_path: Path, browser_path: str
) -> None:
    from playwright.sync_api import sync_playwright

    write_report(page, tmp_path / "report.html")
    faults: list[str] = []
    asked: list[str] = []
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=browser_path, args=arguments)
        tab = browser.new_page()
        tab.on("console", lambda message: faults.append(message.text))
        tab.on("pageerror", lambda error: faults.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto((tmp_path / "report.html").as_uri())
        broken = tab.evaluate(
            "async () => { const all = [...document.querySelectorAll('main img')];"
            " all.forEach(i => i.loading = 'eager');"
            " await Promise.all(all.map(i => i.decode().catch(() => 0)));"
            " return all.filter(i => !i.naturalWidth).length; }"
        )
        wide = {}
        for width in (1280, 390):
            tab.set_viewport_size({"width": width, "height": 900})
            wide[width] = tab.evaluate("document.documentElement.scrollWidth")
        # A4 without its margins of 12 mm is 186 mm, 703 pixels: nothing may reach over the edge.
        tab.set_viewport_size({"width": 703, "height": 1000})
        tab.emulate_media(media="print")
        over = tab.evaluate(
            "[...document.querySelectorAll('table, figure, pre, dl, li, p')]"
            ".filter(e => e.getBoundingClientRect().right > 703.5).map(e => e.outerHTML)"
        )
        browser.close()
    assert faults == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert broken == 0
    assert wide == {1280: 1280, 390: 390}
    assert over == []
