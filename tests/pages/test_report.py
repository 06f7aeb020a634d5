"""The report is one self-contained page that a browser shows without asking for anything else."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from srdeploy.pages import charts
from srdeploy.pages.report import (
    DIFFERENT,
    Bar,
    Bars,
    Charts,
    Code,
    Gallery,
    Legend,
    Picture,
    Report,
    Section,
    Table,
    Text,
    Verdict,
    chart,
    drawing,
    mark_differences,
    photo,
    render,
    write_report,
)
from srdeploy.pages.text import to_markdown


class Resources(HTMLParser):
    """Collects what a page would load from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            own = (value or "").startswith(("data:", "#"))
            if name in ("src", "href", "srcset", "data") and not own:
                self.outside.append(f"{tag} {name}={value}")


@pytest.fixture
def report() -> Report:
    picture = np.zeros((24, 32, 3), np.uint8)
    latencies = {"a": np.linspace(1.0, 2.0, 50), "b": np.linspace(1.1, 2.1, 50)}
    colours = {"a": "#0072b2", "b": "#e69f00"}
    strong = Bar("sky", "0.25", [("score", 25, "blue")], strong=True)
    loss = {"loss": ([0.0, 1.0, 2.0], [3.0, 2.0, 1.0])}
    return Report(
        title="A <b>report</b>",
        lead="What was compared.",
        verdicts=[
            Verdict("same graph", "identical", True),
            Verdict("same labels", "3 differ", False),
            Verdict("latency ratio", "1.001", None),
            Verdict("equally fast", "not shown", None, undecided=True, detail="40 more rounds."),
        ],
        sections=[
            Section(
                title="Everything",
                text="One of each.",
                blocks=[
                    Table(
                        "IoU",
                        ("class", "IoU"),
                        [("road", "0.91\n[0.90, 0.92]"), ("sky", "0.95")],
                        links=["all", ""],
                    ),
                    Text("A remark.", soft=True),
                    Code("srdeploy convert --keep 'a'"),
                    Legend([("a", "#0072b2")]),
                    Charts(
                        [
                            chart("Loss", charts.curves, loss, "step", "loss"),
                            chart("Latency", charts.distributions, latencies, "ms", colours),
                            chart("IoU", charts.bars, ["road"], {"a": [0.5]}, "IoU", colours),
                        ]
                    ),
                    Bars([Bar("road", "+1.00", [("old", 90, "red"), ("new", 91, "blue")], "gray")]),
                    Gallery(
                        ["photo", "mask\nstride 4"],
                        [
                            [photo(picture, "photo 1"), drawing(picture, "mask 1")],
                            [
                                None,
                                Bars([strong]),
                            ],
                        ],
                        titles=["pictures", "scores"],
                        title="Run 1",
                        remark="Trained without classifiers.",
                    ),
                ],
                anchor="all",
            )
        ],
        command="srdeploy demo",
        environment={"torch": "2.13"},
        warnings=["The machine was busy."],
    )


def test_the_page_asks_for_nothing_from_elsewhere(report: Report) -> None:
    resources = Resources()
    resources.feed(render(report))
    assert resources.outside == []


def test_text_is_escaped(report: Report) -> None:
    assert "A &lt;b&gt;report&lt;/b&gt;" in render(report)


def test_each_kind_of_verdict_has_a_mark_of_its_own(report: Report) -> None:
    states = [verdict.state for verdict in report.verdicts]
    assert states == ["passed", "failed", "figure", "undecided"]
    page = render(report)
    for state in states:
        assert page.count(f'<li class="{state}">') == 1
    assert "<small>40 more rounds.</small>" in page


def test_a_page_with_warnings_shows_them_before_its_verdicts(report: Report) -> None:
    page = render(report)
    assert page.index("<li>The machine was busy.</li>") < page.index('<ul class="verdicts')
    assert "<aside" not in render(replace(report, warnings=[]))


def test_a_row_leads_to_its_section_where_it_has_a_link(report: Report) -> None:
    page = render(report)
    assert '<td><a href="#all">road</a></td><td>0.91\n[0.90, 0.92]</td>' in page
    assert "<td>sky</td>" in page
    assert '<section id="all">' in page


def test_a_gallery_shows_pictures_bars_and_empty_cells(report: Report) -> None:
    page = render(report)
    assert '<th scope="col">mask<small>stride 4</small></th>' in page
    assert "<h3>Run 1</h3>" in page
    assert page.index("<span>pictures</span>") < page.index('alt="mask 1"')
    assert "<td></td>" in page
    assert '<li class="strong"><span title="sky">sky</span>' in page
    assert 'aria-label="score 25.00 %"' in page


def test_markdown_shows_all_but_pictures(report: Report) -> None:
    text = to_markdown(report)
    assert text.startswith("## A \\<b\\>report\\</b\\>\n\nWhat was compared.\n\n")
    assert "- **✓ identical** same graph\n- **✗ 3 differ** same labels" in text
    assert "- **? not shown** equally fast. 40 more rounds." in text
    assert "| road | 0.91 \\[0.90, 0.92\\] |" in text
    assert "A remark.\n\n```sh\nsrdeploy convert --keep 'a'\n```" in text
    assert "mask 1" not in text
    pictures = replace(report, sections=[Section("Pictures", blocks=[Charts([])])])
    assert "Pictures" not in to_markdown(pictures)


def test_the_legend_of_the_charts_stands_before_them(report: Report) -> None:
    page = render(report)
    assert page.index('<i style="background: #0072b2"></i>a') < page.index('<div class="charts">')


def test_the_same_report_is_the_same_page(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == render(report)


def test_a_chart_of_the_same_values_is_the_same_text() -> None:
    drawn = [charts.curves({"a": ([0.0, 1.0], [1.0, 2.0])}, "x", "y") for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_differing_pixels_are_marked_on_the_gray_photo_and_no_others() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (7, 9, 3), dtype=np.uint8)
    differs = np.zeros((7, 9), np.bool_)
    differs[2, 3] = differs[6, 8] = True
    marked = mark_differences(image, differs)
    assert np.array_equal((marked == DIFFERENT).all(axis=2), differs)
    assert (marked[~differs] == marked[~differs][:, :1]).all()


def test_thinning_loses_no_differing_pixel() -> None:
    differs = np.zeros((40, 48), np.bool_)
    differs[37, 46] = True
    marked = mark_differences(np.zeros((40, 48, 3), np.uint8), differs, 7)
    assert np.argwhere((marked == DIFFERENT).all(axis=2)).tolist() == [[5, 6]]


def texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]+)</text>", svg)


def test_values_that_span_much_stand_on_a_logarithmic_axis_with_plain_numbers() -> None:
    narrow = charts.dots(["x", "y"], {"a": [40.0, 50.0]}, "ms", {"a": "#0072b2"})
    wide = charts.dots(["x", "y"], {"a": [4.0, 500.0]}, "ms", {"a": "#0072b2"})
    assert not {"10", "100"} & {*texts(narrow)}
    assert {"5", "10", "20", "50", "100", "200", "500"} <= {*texts(wide)}


def test_the_slowest_run_of_each_lies_within_the_chart_of_tails() -> None:
    samples = {"a": np.append(np.full(99, 10.0), 900.0), "b": np.full(100, 11.0)}
    drawn = charts.tails(samples, "ms", {"a": "#111111", "b": "#222222"})
    ticks = [float(text) for text in texts(drawn) if text.replace(".", "").isdigit()]
    assert {10.0, 100.0, 500.0, 0.01, 0.1} <= {*ticks}
    # The marker of the slowest run is the last of its colour, inside the frame of 5 inches.
    places = re.findall(r'<use [^>]*x="([\d.]+)"[^>]*fill: #111111', drawn)
    assert len(places) == 1
    assert 0 < float(places[0]) < 72 * charts.COLUMN[0]


def test_a_margin_is_shaded_only_where_one_was_asked_for() -> None:
    found = charts.Ratios(
        rounds=[1.0, 1.01],
        interval=(1.005, 1.0, 1.01),
        floor=(1.0, 0.99, 1.01),
        floor_rounds=[0.99, 1.01],
        margin=0.02,
        colour="#0072b2",
    )
    shade = "fill: #009e73"
    assert shade in charts.ratios(found, "ratio")
    assert shade not in charts.ratios(replace(found, margin=None), "ratio")


def test_a_class_without_a_value_leaves_a_gap_and_dollars_are_no_formula() -> None:
    colours = {"a": "#0072b2"}
    drawn = charts.bars(["$x$", "y"], {"a": [50.0, None]}, "IoU", colours)
    assert drawn.count("fill: #0072b2") == 1
    assert {"$x$", "y"} <= {*texts(drawn)}


def test_every_picture_carries_its_caption_as_alternative_text(report: Report) -> None:
    page = render(report)
    for caption in ("Loss", "Latency", "IoU", "photo 1", "mask 1"):
        assert f'alt="{caption}"' in page


def test_a_picture_is_a_data_uri() -> None:
    made = drawing(np.zeros((2, 2, 3), np.uint8), "x")
    assert isinstance(made, Picture)
    assert made.source.startswith("data:image/png;base64,")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("width", [1280, 390], ids=["desk", "phone"])
def test_a_browser_shows_every_picture_without_errors_or_sideways_scrolling(
    report: Report, tmp_path: Path, width: int, browser_path: str
) -> None:
    from playwright.sync_api import sync_playwright

    write_report(report, tmp_path / "report.html")
    faults: list[str] = []
    asked: list[str] = []
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=browser_path, args=arguments)
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((tmp_path / "report.html").as_uri())
        broken = page.evaluate(
            "async () => { const all = [...document.querySelectorAll('main img')];"
            " all.forEach(i => i.loading = 'eager');"
            " await Promise.all(all.map(i => i.decode().catch(() => 0)));"
            " return all.filter(i => !i.naturalWidth).length; }"
        )
        overflow = page.evaluate("document.documentElement.scrollWidth > window.innerWidth")
        verdicts = page.locator(".verdicts li").count()
        browser.close()
    assert faults == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert (broken, overflow, verdicts) == (0, False, 4)
