"""The page shows what differs, where and by how much, and asks for nothing from elsewhere."""

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from srdeploy.export.verify import verification_line
from srdeploy.imaging import Pixels
from srdeploy.runtimes.registry import open_runtime
from srdeploy.spec import Spec

BODY = "network/body/0/Conv"


class Contents(HTMLParser):
    """What a page would load from elsewhere, its pictures' texts, and the cells of its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.pictures: list[str] = []
        self.rows: list[list[str]] = []
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        for name in ("src", "href", "srcset", "data"):
            if name in values and not (values[name] or "").startswith("data:"):
                self.outside.append(f"{tag} {name}={values[name]}")
        if tag == "img" and "src" in values:
            self.pictures.append(values["alt"] or "")
        if tag == "tr":
            self.rows.append([])
        self._cell = tag == "td"

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.rows[-1].append(data)
            self._cell = False


@pytest.fixture(scope="module")
def broken(tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("broken") / "model.onnx"
    model = onnx.load(str(tiny_file))
    tensor = next(t for t in model.graph.initializer if t.name == "network.body.0.weight")
    array = np.ascontiguousarray(numpy_helper.to_array(tensor)[::-1])
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, str(path))
    return path


@pytest.fixture(scope="module")
def masks(tiny_file: Path, photos: list[Pixels]) -> list[Pixels]:
    with open_runtime(tiny_file) as runtime:
        return [runtime.run(photo[None])[0] for photo in photos]


@pytest.fixture(scope="module")
def page(
    broken: Path,
    tiny_file: Path,
    spec: Spec,
    photos: list[Pixels],
    masks: list[Pixels],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Of a conversion with one broken weight, against true masks."""
    path = tmp_path_factory.mktemp("page") / "differences.html"
    line = verification_line(tiny_file, broken, spec, photos, "int8", page=path, masks=masks)
    assert line.passed is False
    return path


def test_the_page_of_a_failure_says_what_where_and_what_to_do(page: Path, spec: Spec) -> None:
    text = page.read_text()
    contents = Contents(text)
    assert contents.outside == []
    assert "not verified" in text
    assert "Tolerance that would have passed" in text
    assert f"begins at node &#39;{BODY}&#39;" in text
    assert f"<pre>--keep &#39;{BODY}&#39;</pre>" in text
    assert all(name in text for name in spec.classes)
    (largest,) = [row for row in contents.rows if row[:1] == ["largest"]]
    assert largest[1] == "1 × 64 × 80"
    assert largest[5] == "✗"
    for photo in ("Photo 1", "Photo 2"):
        mine = [alt for alt in contents.pictures if alt.startswith(photo)]
        assert len(mine) == 4
        assert mine[3].endswith("pixels differ")
    assert "Error of each layer's output, relative to float32" in contents.pictures


def test_the_page_of_equal_graphs_has_no_flags(
    tiny_file: Path, spec: Spec, photos: list[Pixels], tmp_path: Path
) -> None:
    path = tmp_path / "differences.html"
    assert verification_line(tiny_file, tiny_file, spec, photos, "int8", page=path).passed
    text = path.read_text()
    assert "verified" in text
    assert "not verified" not in text
    assert "--keep" not in text
    assert "Layer by layer both graphs compute the same" in text
    assert [alt for alt in Contents(text).pictures if alt.endswith(": 0 pixels differ")] != []


def test_without_a_page_none_is_written(
    tiny_file: Path, spec: Spec, photos: list[Pixels], tmp_path: Path
) -> None:
    before = sorted(tiny_file.parent.iterdir())
    verification_line(tiny_file, tiny_file, spec, photos, "int8")
    assert sorted(tiny_file.parent.iterdir()) == before


def test_class_names_are_escaped(
    tiny_file: Path, spec: Spec, photos: list[Pixels], tmp_path: Path
) -> None:
    named = spec.model_copy(update={"classes": ("<b>sky</b>", "road", "tree")})
    model = onnx.load(str(tiny_file))
    for entry in model.metadata_props:
        if entry.key == "srdeploy.spec":
            entry.value = named.to_json()
    onnx.save(model, str(tmp_path / "m.onnx"))
    path = tmp_path / "differences.html"
    verification_line(tmp_path / "m.onnx", tmp_path / "m.onnx", named, photos, "fp32", page=path)
    assert "<b>sky" not in path.read_text()
    assert "&lt;b&gt;sky" in path.read_text()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_browser_shows_the_page_and_enlarges_its_pictures(
    width: int, scheme: Any, page: Path, browser_path: str
) -> None:
    from playwright.sync_api import sync_playwright

    faults: list[str] = []
    asked: list[str] = []
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=browser_path, args=arguments)
        tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        tab.on("console", lambda message: faults.append(message.text))
        tab.on("pageerror", lambda error: faults.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(page.as_uri())
        broken = tab.evaluate(
            "async () => { const all = [...document.querySelectorAll('main img')];"
            " all.forEach(i => i.loading = 'eager');"
            " await Promise.all(all.map(i => i.decode().catch(() => 0)));"
            " return all.filter(i => !i.naturalWidth).length; }"
        )
        overflow = tab.evaluate("document.documentElement.scrollWidth > window.innerWidth")
        needed = tab.locator(".table td:nth-child(4)").first.bounding_box()
        button = tab.locator(".gallery button").nth(3)
        small = button.bounding_box()
        button.focus()
        tab.keyboard.press("Enter")
        large = tab.locator("dialog[open] img").bounding_box()
        told = tab.locator("dialog p").inner_text()
        tab.keyboard.press("Escape")
        left_open = tab.locator("dialog[open]").count()
        browser.close()
    assert faults == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert (broken, overflow, left_open) == (0, False, 0)
    assert needed is not None
    assert needed["x"] + needed["width"] <= width  # seen without scrolling sideways
    assert small is not None
    assert large is not None
    assert large["width"] > small["width"]
    assert large["x"] >= 0
    assert large["x"] + large["width"] <= width
    assert told.endswith("pixels differ")


def test_the_page_is_the_same_for_the_same_findings(
    page: Path,
    broken: Path,
    tiny_file: Path,
    spec: Spec,
    photos: list[Pixels],
    masks: list[Pixels],
    tmp_path: Path,
) -> None:
    path = tmp_path / "again.html"
    verification_line(tiny_file, broken, spec, photos, "int8", page=path, masks=masks)
    assert path.read_text() == page.read_text()
