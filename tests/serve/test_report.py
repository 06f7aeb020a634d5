"""The report is one self-contained page that a browser shows without asking for anything else."""

from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from srdeploy.serve import charts
from srdeploy.serve.report import (
    Picture,
    Report,
    Section,
    Table,
    Verdict,
    chart,
    drawing,
    photo,
    render,
    write_report,
)


class Resources(HTMLParser):
    """Collects what a page would load from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data") and not (value or "").startswith("data:"):
                self.outside.append(f"{tag} {name}={value}")


@pytest.fixture
def report() -> Report:
    picture = np.zeros((24, 32, 3), np.uint8)
    latencies = {"a": np.linspace(1.0, 2.0, 50), "b": np.linspace(1.1, 2.1, 50)}
    return Report(
        title="A <b>report</b>",
        lead="What was compared.",
        verdicts=[
            Verdict("same graph", "identical", True),
            Verdict("same labels", "3 differ", False),
            Verdict("latency ratio", "1.001", None),
        ],
        sections=[
            Section(
                title="Everything",
                text="One of each.",
                tables=[Table("IoU", ("class", "IoU"), [("road", "0.91"), ("sky", "0.95")])],
                charts=[
                    chart(
                        charts.curves({"loss": ([0, 1, 2], [3.0, 2.0, 1.0])}, "step", "loss"),
                        "Loss",
                    ),
                    chart(charts.distributions(latencies, "ms"), "Latency"),
                    chart(charts.grouped_bars(["road", "sky"], {"a": [0.5, None]}, "IoU"), "IoU"),
                ],
                gallery_header=["photo", "mask"],
                gallery=[[photo(picture, "photo 1"), drawing(picture, "mask 1")]],
                legend=[("road", "rgb(1, 2, 3)")],
            )
        ],
        command="srdeploy demo",
        environment={"torch": "2.13"},
    )


def test_the_page_asks_for_nothing_from_elsewhere(report: Report) -> None:
    resources = Resources()
    resources.feed(render(report))
    assert resources.outside == []


def test_text_is_escaped(report: Report) -> None:
    assert "A &lt;b&gt;report&lt;/b&gt;" in render(report)


def test_the_same_report_is_the_same_page(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == render(report)


def test_a_chart_of_the_same_values_is_the_same_text() -> None:
    bars = [charts.grouped_bars(["x"], {"a": [1.0]}, "y") for _ in range(2)]
    assert bars[0] == bars[1]


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
            "async () => { const all = [...document.images];"
            " all.forEach(i => i.loading = 'eager');"
            " await Promise.all(all.map(i => i.decode().catch(() => 0)));"
            " return all.filter(i => !i.naturalWidth).length; }"
        )
        overflow = page.evaluate("document.documentElement.scrollWidth > window.innerWidth")
        verdicts = page.locator(".verdicts li").count()
        browser.close()
    assert faults == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert (broken, overflow, verdicts) == (0, False, 3)
