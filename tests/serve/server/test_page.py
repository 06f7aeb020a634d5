"""The page at `/` in a real browser, against a fake server that answers with known labels as the
real server does."""

import io
import threading
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from srdeploy.serve.server.page import render_page
from tests.serve.server.fake_server import (
    HEIGHT,
    HOSTILE,
    MODELS,
    WIDTH,
    FakeServer,
    labels_of,
    names_at,
    photo_bytes,
)
from tests.serve.server.live import LiveServer

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # playwright's own pipes


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeServer)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def browser(browser_path: str) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def desktop(browser: Any) -> Any:
    """One page for all tests that need no other device: opening one takes a while."""
    return browser.new_context(viewport={"width": 1000, "height": 800}).new_page()


@pytest.fixture(scope="module")
def phone(browser: Any) -> Any:
    options = {"has_touch": True, "is_mobile": True}
    return browser.new_context(viewport={"width": 360, "height": 740}, **options).new_page()


Open = Callable[..., Any]


@pytest.fixture
def open_page(address: str) -> Iterator[Open]:
    """Loads the page afresh; at the end of the test nothing may have gone wrong or elsewhere."""
    FakeServer.reset()
    faults: list[str] = []
    asked: list[str] = []
    opened = []

    def console(message: Any) -> None:
        # The browser notes each answer that is an error, and warns of this test's reading pixels.
        if "Failed to load resource" not in message.text and "Canvas2D" not in message.text:
            faults.append(message.text)

    def fault(error: Any) -> None:
        faults.append(str(error))

    def request(request: Any) -> None:
        asked.append(request.url)

    listeners = {"console": console, "pageerror": fault, "request": request}

    def open_page(page: Any) -> Any:
        opened.append(page)
        page.set_default_timeout(5000)
        for event, listener in listeners.items():
            page.on(event, listener)
        page.goto(address)
        page.wait_for_selector("#legend li, #key-form:visible")
        return page

    yield open_page
    FakeServer.released.set()
    for page in opened:
        page.evaluate("sessionStorage.clear()")
        for event, listener in listeners.items():
            page.remove_listener(event, listener)
    assert faults == []
    own = (address, "data:", f"blob:{address}")
    assert [url for url in asked if not url.startswith(own)] == []


def upload(page: Any, body: bytes | None = None, name: str = "street.png") -> None:
    """Chooses a photo and waits until all models have answered."""
    file = {"name": name, "mimeType": "image/png", "buffer": body or photo_bytes()}
    page.set_input_files("#file", file)
    page.wait_for_selector("#work[aria-busy=true]", state="detached")
    page.wait_for_selector("#legend button")


def view(page: Any, name: str) -> None:
    page.check(f"input[name=view][value={name}]", force=True)


def pixel(page: Any, x: float, y: float) -> list[int]:
    """RGB of the canvas at a place given as shares of its width and height."""
    script = """([x, y]) => { const c = document.getElementById("canvas");
        return [...c.getContext("2d").getImageData(x * c.width, y * c.height, 1, 1).data] }"""
    return cast(list[int], page.evaluate(script, [x, y]))[:3]


def hover(page: Any, x: float, y: float) -> str:
    """What the tip says at a place given as shares of the canvas."""
    box = page.locator("#canvas").bounding_box()
    page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
    return cast(str, page.locator("#tip").inner_text())


def legend(page: Any) -> list[list[str]]:
    """Cells of the legend's lines."""
    script = """lines => lines.map(line => [line.querySelector("span").textContent,
        ...[...line.querySelectorAll("data span")].map(cell => cell.textContent)])"""
    return cast(list[list[str]], page.eval_on_selector_all("#legend .entry", script))


def test_an_upload_gives_a_legend_of_areas_largest_first(open_page: Open, desktop: Any) -> None:
    FakeServer.models = ["plain"]
    page = open_page(desktop)
    upload(page)
    shares = {
        name: (names_at("plain", labels_of("plain", HEIGHT, WIDTH)) == name).mean()
        for name in ("sky", "road", HOSTILE)
    }
    expected = [
        [name, f"{100 * shares[name]:.1f} %"] for name in sorted(shares, key=shares.__getitem__)
    ]
    assert legend(page) == [*expected[::-1], ["not labelled", "10.0 %"]]
    assert page.locator("#pick").is_hidden()
    assert page.locator("#split").is_hidden()


def test_the_class_under_the_pointer_is_named_with_its_colour(
    open_page: Open, desktop: Any
) -> None:
    FakeServer.models = ["plain"]
    page = open_page(desktop)
    upload(page)
    # One pixel on each side of the border between sky and road, and of the ignored rows.
    at = WIDTH // 2
    assert hover(page, (at - 0.5) / WIDTH, 0.5) == "sky"
    assert hover(page, (at + 0.5) / WIDTH, 0.5) == "road"
    colour = page.eval_on_selector("#tip .swatch", "i => getComputedStyle(i).backgroundColor")
    assert colour == "rgb(200, 40, 60)"
    assert hover(page, 0.2, (HEIGHT - 12 - 0.5) / HEIGHT) == "sky"
    assert hover(page, 0.2, (HEIGHT - 12 + 0.5) / HEIGHT) == "not labelled"
    assert page.locator("#legend .under").count() == 0
    hover(page, 0.2, 0.2)
    assert page.locator("#legend .under").inner_text().startswith("sky")


def test_views_and_opacity_change_what_is_drawn(open_page: Open, desktop: Any) -> None:
    FakeServer.models = ["plain"]
    page = open_page(desktop)
    upload(page)
    sky = (40, 90, 220)
    for opacity in (0.25, 1.0):
        page.locator("#opacity").fill(str(int(100 * opacity)))
        mixed = [100 * (1 - opacity) + opacity * value for value in sky]
        assert np.abs(np.subtract(pixel(page, 0.2, 0.5), mixed)).max() <= 1
        assert pixel(page, 0.2, 0.97) == [100, 100, 100]  # ignored: the photo shows
    view(page, "mask")
    assert pixel(page, 0.2, 0.5) == list(sky)
    assert pixel(page, 0.2, 0.97) == [224, 224, 192]
    assert page.locator("#opacity").is_disabled()
    view(page, "photo")
    assert pixel(page, 0.2, 0.5) == [100, 100, 100]


def test_a_class_pressed_in_the_legend_or_the_picture_is_shown_without_the_others(
    open_page: Open, desktop: Any
) -> None:
    FakeServer.models = ["plain"]
    page = open_page(desktop)
    upload(page)
    before = pixel(page, 0.7, 0.5)
    page.click("#legend button:has-text('sky')")
    assert page.locator("#legend [aria-pressed=true]").inner_text().startswith("sky")
    assert max(pixel(page, 0.7, 0.5)) < 60  # road is veiled
    assert pixel(page, 0.2, 0.5)[2] > 150
    box = page.locator("#canvas").bounding_box()
    page.mouse.click(box["x"] + 0.7 * box["width"], box["y"] + 0.5 * box["height"])
    assert page.locator("#legend [aria-pressed=true]").inner_text().startswith("road")
    page.keyboard.press("Escape")
    assert page.locator("#legend [aria-pressed=true]").count() == 0
    assert pixel(page, 0.7, 0.5) == before


def test_two_models_share_one_picture_and_a_border_that_moves(
    open_page: Open, desktop: Any
) -> None:
    page = open_page(desktop)
    upload(page)
    assert [line.split("model=")[1] for line in FakeServer.asked] == ["plain", "small+%3Cb%3E"]
    left, right = (names_at(name, labels_of(name, HEIGHT, WIDTH)) for name in MODELS)
    assert page.inner_text("#differ") == f"{100 * (left != right).mean():.1f} %"
    assert legend(page)[0] == ["sky", "45.0 %", "57.0 %"]
    view(page, "mask")
    sky, road = [40, 90, 220], [200, 40, 60]
    place = (0.55, 0.5)  # road for the left model, sky for the right one
    assert pixel(page, *place) == sky
    assert hover(page, *place).split("\n") == ["road", "plain", "sky", "small <b>"]
    slider = page.locator("#split").bounding_box()
    middle = slider["y"] + slider["height"] / 2
    page.mouse.move(slider["x"] + slider["width"] / 2, middle)
    page.mouse.down()
    page.mouse.move(slider["x"] + slider["width"] * 0.8, middle, steps=3)
    page.mouse.up()
    assert pixel(page, *place) == road
    page.locator("#split").press("Home")
    assert pixel(page, *place) == sky
    view(page, "differences")
    assert pixel(page, *place) == [255, 0, 170]
    assert max(pixel(page, 0.2, 0.5)) < 60


def test_the_models_on_both_sides_can_be_chosen(open_page: Open, desktop: Any) -> None:
    page = open_page(desktop)
    upload(page)
    page.select_option("#right", "")
    assert page.locator("#split").is_hidden()
    assert page.locator(".card h2").all_inner_texts() == ["plain"]
    page.select_option("#left", "small <b>")
    page.wait_for_selector("#work[aria-busy=true]", state="detached")
    assert legend(page)[0] == ["sky", "57.0 %"]
    assert len(FakeServer.asked) == 2  # what was computed is not asked for again
    page.select_option("#right", "plain")
    assert legend(page)[0] == ["sky", "57.0 %", "45.0 %"]


def test_times_and_facts_of_a_model_are_shown(open_page: Open, desktop: Any) -> None:
    FakeServer.models = ["plain"]
    page = open_page(desktop)
    upload(page)
    spans = page.locator(".split li").all_inner_texts()
    told = [" ".join(span.split()) for span in spans]
    assert told[:4] == ["decode 2.5 ms", "wait 0.5 ms", "compute 12 ms", "encode 1.0 ms"]
    assert told[4].startswith("network, browser ")
    parts = page.eval_on_selector_all(".stack i", "all => all.map(i => i.offsetWidth)")
    whole = page.eval_on_selector(".stack", "stack => stack.clientWidth")
    assert parts[2] > parts[0] > parts[1]
    assert abs(sum(parts) - whole) <= 5
    facts = page.inner_text(".card dl")
    plan = "2 sessions of 1 thread, up to 8 images a run; 1 session of 2 threads for low latency"
    for fact in ("onnxruntime", "cpu", "fp32", plan, "32×32 to 960×720"):
        assert fact in facts


def test_the_mask_is_saved_as_the_server_wrote_it(open_page: Open, desktop: Any) -> None:
    page = open_page(desktop)
    upload(page)
    with page.expect_download() as waiting:
        page.click("button:has-text('Download mask') >> nth=0")
    assert waiting.value.suggested_filename == "street-plain.png"
    with Image.open(waiting.value.path()) as mask:
        assert np.array_equal(np.array(mask), labels_of("plain", HEIGHT, WIDTH))


def test_a_photo_on_its_side_stands_upright_beneath_its_labels(
    open_page: Open, desktop: Any
) -> None:
    FakeServer.models = ["plain"]
    page = open_page(desktop)
    page.click("#samples button")  # the sample is 64x48 and turned by its EXIF orientation
    page.wait_for_selector("#legend button")
    box = page.locator("#canvas").bounding_box()
    assert box["width"] / box["height"] == pytest.approx(48 / 64, abs=0.01)
    assert page.get_attribute("#samples button", "aria-pressed") == "true"
    assert hover(page, 0.49, 0.5) == "sky"
    assert hover(page, 0.52, 0.5) == "road"


def test_a_photo_larger_than_the_models_take_is_sent_smaller(open_page: Open, desktop: Any) -> None:
    page = open_page(desktop)
    upload(page, photo_bytes(2000, 1500))
    width, height = FakeServer.sizes[0]
    assert FakeServer.sizes == [(width, height)] * 2
    assert 0.99 * 720 * 960 < width * height <= 720 * 960
    assert width / height == pytest.approx(2000 / 1500, abs=0.01)
    told = f"street.png, 2000×1500, sent as {width}×{height}: the models take no more"
    assert page.inner_text("#size") == told
    upload(page, photo_bytes(960, 720))
    assert FakeServer.sizes[2:] == [(960, 720)] * 2
    assert page.inner_text("#size") == "street.png, 960×720"


def test_dropped_and_pasted_photos_are_taken(open_page: Open, desktop: Any) -> None:
    FakeServer.models = ["plain"]
    page = open_page(desktop)
    script = """async ([kind, bytes]) => {
        const files = new DataTransfer();
        files.items.add(new File([new Uint8Array(bytes)], "a.png", {type: "image/png"}));
        const given = {bubbles: true, cancelable: true};
        document.body.dispatchEvent(kind === "drop"
            ? new DragEvent("drop", {dataTransfer: files, ...given})
            : new ClipboardEvent("paste", {clipboardData: files, ...given})) }"""
    for count, kind in enumerate(("drop", "paste"), 1):
        page.evaluate(script, [kind, list(photo_bytes(40 * count, 30))])
        page.wait_for_selector(f'#stage[style*="ratio: {str(40 * count / 30)[:5]}"]')
        page.wait_for_selector("#legend button")


def test_a_photo_that_the_browser_cannot_show_still_gets_its_mask(
    open_page: Open, desktop: Any
) -> None:
    FakeServer.models = ["plain"]
    page = open_page(desktop)
    buffer = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT)).save(buffer, "TIFF")
    upload(page, buffer.getvalue(), "scan.tiff")
    view(page, "mask")
    assert pixel(page, 0.2, 0.5) == [40, 90, 220]


def test_the_line_of_an_error_is_announced_and_goes_away(open_page: Open, desktop: Any) -> None:
    FakeServer.models = ["plain"]
    page = open_page(desktop)
    FakeServer.failure = (503, "64 requests are waiting: <b>try again</b> in 1 s")
    file = {"name": "a.png", "mimeType": "image/png", "buffer": photo_bytes()}
    page.set_input_files("#file", file)
    alert = page.get_by_role("alert")
    alert.wait_for()
    assert alert.inner_text() == FakeServer.failure[1]
    assert page.get_attribute("#work", "aria-busy") == "false"
    FakeServer.failure = None
    upload(page)
    assert page.locator("#error").inner_text() == ""


def test_a_file_over_the_limit_is_not_sent(open_page: Open, desktop: Any) -> None:
    page = open_page(desktop)
    file = {"name": "large.png", "mimeType": "image/png", "buffer": bytes(3 * 2**19)}
    page.set_input_files("#file", file)
    told = page.get_by_role("alert").inner_text()
    assert told == "large.png has 1.5 MiB, the server takes 1 at most: save it smaller."
    assert FakeServer.asked == []


def test_a_key_is_asked_for_kept_for_the_session_and_sent(open_page: Open, desktop: Any) -> None:
    FakeServer.key = "a key of ours"
    page = open_page(desktop)
    page.wait_for_selector("#key-form")
    assert page.inner_text("#error") == ""  # nothing went wrong yet
    page.get_by_label("API key").fill("another")
    page.keyboard.press("Enter")
    page.get_by_role("alert").wait_for()
    assert page.inner_text("#error") == "this server asks for its API key"
    page.get_by_label("API key").fill(FakeServer.key)
    page.click("text=Use this key")
    page.wait_for_selector("#samples img")  # samples come with the key too
    upload(page)
    page.reload()
    upload(page)
    assert page.inner_text("#error") == ""


def test_work_is_shown_without_moving_anything(open_page: Open, desktop: Any) -> None:
    FakeServer.models = ["plain"]
    page = open_page(desktop)
    upload(page)
    places = (
        "['stage', 'views', 'legend', 'cards'].map(id => document.getElementById(id).offsetTop)"
    )
    before = page.evaluate(places)
    FakeServer.released.clear()
    file = {"name": "b.png", "mimeType": "image/png", "buffer": photo_bytes()}
    page.set_input_files("#file", file)
    page.wait_for_selector("#work[aria-busy=true]")
    assert page.locator(".progress").is_visible()
    during = page.evaluate(places)
    FakeServer.released.set()
    page.wait_for_selector("#work[aria-busy=false]")
    assert before == during == page.evaluate(places)
    assert page.locator(".progress").is_hidden()


def test_everything_can_be_done_with_only_the_keyboard(open_page: Open, desktop: Any) -> None:
    page = open_page(desktop)
    upload(page)
    page.evaluate("document.activeElement.blur()")
    reached = []
    outlined = """() => { const e = document.activeElement, shown = e.closest("label") ?? e;
        const thumb = e.id === "split"; // its thumb carries the outline, which scripts can't read
        return [e.id || e.name || e.textContent.trim(), thumb || [e, shown].some(
            one => getComputedStyle(one).outlineStyle === "solid")] }"""
    for _ in range(40):
        page.keyboard.press("Tab")
        name, visible = page.evaluate(outlined)
        assert visible, name
        if name in reached:
            break
        reached.append(name)
        if name == "canvas":
            page.keyboard.press("ArrowRight")
            assert page.inner_text("#readout") == "road says plain, sky says small <b>, " + (
                "column 80, row 60"
            )
            page.keyboard.press("Shift+ArrowLeft")
            assert page.inner_text("#readout") == "sky, column 79, row 60"
            page.keyboard.press("Enter")
            assert page.locator("#legend [aria-pressed=true]").inner_text().startswith("sky")
            page.keyboard.press("Escape")
        if name == "split":
            page.keyboard.press("End")
            assert "plain on the left 100 %" in page.get_attribute("#split", "aria-valuetext")
        if name == "view":
            page.keyboard.press("ArrowRight")
            assert page.locator("input[value=mask]").is_checked()
            page.keyboard.press("ArrowLeft")
    expected = ["choose", "left", "right", "canvas", "split", "view", "opacity"]
    assert [name for name in reached if name in expected] == expected
    assert sum("Download mask" in name for name in reached) >= 1
    assert sum("%" in name for name in reached) == 3  # the legend


def test_a_phone_shows_it_all_without_sideways_scrolling(open_page: Open, phone: Any) -> None:
    page = open_page(phone)
    wide = "document.documentElement.scrollWidth"
    page.wait_for_selector("#samples img")
    assert page.evaluate(wide) == 360
    upload(page)
    assert page.evaluate(wide) == 360
    assert page.locator("#take").is_visible()
    assert page.get_attribute("#camera", "capture") == "environment"
    box = page.locator("#canvas").bounding_box()
    page.touchscreen.tap(box["x"] + 0.2 * box["width"], box["y"] + 0.2 * box["height"])
    assert page.inner_text("#tip") == "sky"


def test_the_page_is_light_or_dark_as_the_system_is(open_page: Open, desktop: Any) -> None:
    page = open_page(desktop)
    sums = (
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
        ".map(colour => colour.match(/\\d+/g).reduce((sum, value) => sum + +value, 0))"
    )
    page.emulate_media(color_scheme="light")
    ink, paper = page.evaluate(sums)
    assert paper > 700 > 150 > ink
    page.emulate_media(color_scheme="dark")
    ink, paper = page.evaluate(sums)
    assert ink > 500 > 100 > paper
    page.emulate_media(color_scheme="light")


def test_motion_stops_for_those_who_ask_for_it(open_page: Open, desktop: Any) -> None:
    page = open_page(desktop)
    script = "getComputedStyle(document.querySelector('.progress'), '::before').animationName"
    assert page.evaluate(script) == "slide"
    page.emulate_media(reduced_motion="reduce")
    assert page.evaluate(script) == "none"
    page.emulate_media(reduced_motion="no-preference")


def test_names_are_text_whatever_they_hold(open_page: Open, desktop: Any) -> None:
    page = open_page(desktop)
    upload(page, name="<b>photo</b>.png")
    assert hover(page, 0.9, 0.1).split("\n")[0] == HOSTILE
    assert page.title() == "srdeploy: segment a photo"
    assert page.locator("#legend img, #tip img, .card b b, option b, h2 b").count() == 0
    assert page.locator(".card h2").all_inner_texts() == [*MODELS]


def test_the_policy_allows_only_this_script_and_style() -> None:
    page, policy = render_page()
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    for kind in ("script", "style"):
        assert page.count(f"<{kind}>") == 1
        assert rules[f"{kind}-src"].startswith("'sha256-")
        assert " " not in rules[f"{kind}-src"]
    assert " style=" not in page
    assert " onclick=" not in page


def test_the_real_server_answers_the_page(
    browser: Any, make_graph: Callable[..., Path], tmp_path: Path
) -> None:
    graphs = [make_graph(name) for name in ("night.onnx", "day.onnx")]
    server = LiveServer(tmp_path / "live", *graphs, "--set", "sessions=1", "--set", "max_batch=1")
    page = browser.new_context(viewport={"width": 1000, "height": 800}).new_page()
    faults: list[str] = []
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    try:
        page.goto(server.url)
        page.locator("#samples button").first.click()
        page.wait_for_selector("#differ:has-text('%')")
        differ = page.locator("#differ").inner_text()
        shown = page.locator("body").inner_text()
    finally:
        page.context.close()
        server.kill()
    assert "field" in shown  # green, as most of a meadow is
    assert "onnxruntime" in shown
    assert float(differ.rstrip(" %")) == 0  # the models are equal
    assert faults == []
