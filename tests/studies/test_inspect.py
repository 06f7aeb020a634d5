"""`srdeploy inspect` as people call it: how a network is read, and what each exit of a run sees."""

import json
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from srdeploy.cli.main import main
from srdeploy.imaging import encode_mask, read_photo
from srdeploy.runs import open_run
from srdeploy.studies.inspection import load_subjects, shown_size, view_photos
from srdeploy.studies.inspection_figure import figure_png
from srdeploy.studies.inspection_page import heat_picture
from srdeploy.train.pictures import ExitView

pytestmark = pytest.mark.wheel

Verb = Callable[..., tuple[int, str, str]]

SMALL = [
    *("--network", "unet", "--steps", "2", "--batch", "2", "--crop", "32x40", "--workers", "0"),
    *("--device", "cpu", "--set", "network.options.width=4", "--set", "regulation.width=4", "-q"),
]
CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, width=8):
        super().__init__()
        self.early = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU())
        self.late = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU())
        self.head = nn.Conv2d(2 * width, classes, 1)
        self.aux = nn.Conv2d(width, classes, 1)

    def forward(self, images):
        early = self.early(images)
        return {"out": self.head(self.late(early)), "aux": self.aux(early)}
"""


def call(arguments: tuple[object, ...], patch: pytest.MonkeyPatch) -> int:
    """Runs `srdeploy ARGUMENTS` in this process; returns the exit code."""
    patch.setattr(sys, "argv", ["srdeploy", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        main()
    return int(exit.value.code or 0)


@pytest.fixture
def srdeploy(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Verb:
    """Runs `srdeploy ARGUMENTS`; returns the exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = call(arguments, monkeypatch)
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def runs(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders "regulated" and "baseline": two runs of two steps."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        for name, flag in (("regulated", "--sr"), ("baseline", "--no-sr")):
            arguments = ("train", tiny_data, "--out", folder / name, *SMALL, flag)
            assert call(arguments, patch) == 0
    return folder


@pytest.fixture(scope="module")
def photo(tiny_data: Path) -> Path:
    return tiny_data / "images" / "val" / "val_00.png"


@pytest.fixture(scope="module")
def truth(tiny_data: Path) -> Path:
    return tiny_data / "labels" / "val" / "val_00.png"


class Resources(HTMLParser):
    """Collects the images of a page, and what it would load from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.alts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data") and not (value or "").startswith("data:"):
                self.outside.append(f"{tag} {name}={value}")
        values = dict(attrs)
        if tag == "img" and "src" in values:
            self.alts.append(values["alt"] or "")


# How a network is read


def test_a_built_in_network_s_taps_are_told_with_their_reasons(srdeploy: Verb) -> None:
    code, out, err = srdeploy("inspect", "unet", "--option", "width=4", "--classes", "5")
    assert code == 0
    assert "unet (UNet)" in out
    for word in ("encoder.0", "encoder.4", "NCHW", "stages", "a tensor of logits"):
        assert word in out
    assert "regulation.taps=[encoder.0, encoder.1" in err


def test_a_network_of_one_s_own_is_read_with_its_heads(
    srdeploy: Verb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inspected_nets.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    code, out, _ = srdeploy("inspect", "inspected_nets:Net", "--classes", "4", "--json")
    assert code == 0
    found = json.loads(out)
    assert [tap["stride"] for tap in found["taps"]] == [2, 4]
    assert all(tap["reason"] for tap in found["taps"])
    assert found["source"] == "traced"
    assert found["auxiliary_heads"] == {"aux": 0.4}
    assert found["auxiliary"] == [{"name": "aux", "parameters": 36, "runs": True, "classes": 4}]
    assert found["output"]["classes"] == 4
    assert "the logits are its 'out'" in found["output"]["form"]
    _, told, _ = srdeploy("inspect", "inspected_nets:Net", "--classes", "4")
    assert "supervised in training, weight 0.4; left out of what is deployed" in told


def test_taps_that_people_name_are_read_instead(srdeploy: Verb) -> None:
    code, out, _ = srdeploy(
        *("inspect", "unet", "--option", "width=4", "--taps", "encoder.1,encoder.3", "--json"),
    )
    assert code == 0
    found = json.loads(out)
    assert (found["source"], [tap["name"] for tap in found["taps"]]) == (
        "given",
        ["encoder.1", "encoder.3"],
    )


@pytest.mark.parametrize("name", ["regulated", "baseline"])
def test_a_run_is_read_as_it_was_trained(srdeploy: Verb, runs: Path, name: str) -> None:
    code, out, _ = srdeploy("inspect", runs / name, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["classes"] == 3
    assert [tap["channels"] for tap in found["taps"]] == [4, 8, 16, 32, 64]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["unett"], "did you mean 'unet'"),
        (["unet", "--option", "width=4", "--taps", "encoder.9"], "encoder.9"),
        (["unet", "--option", "widht=4"], "widht"),
        (["unet", "--size", "64"], "--size '64'"),
        (["RUNS/regulated", "--classes", "4"], "leave --classes out"),
        (["unet", "--before", "RUNS/baseline"], "--before is for photos"),
        (["no/such/run", "PHOTO"], "no run folder no/such/run"),
        (["unet", "PHOTO"], "no run folder unet"),
        (["RUNS", "PHOTO"], "is not a run folder"),
        (["RUNS/regulated", "missing.png"], "no such file: missing.png"),
        (["RUNS/regulated", "RUNS/regulated/config.yaml"], "not a readable image"),
        (["RUNS/regulated", "PHOTO", "--out", "x.pdf"], "a page (.html) or a picture (.png)"),
        (["RUNS/regulated", "PHOTO", "--out", "PHOTO"], "is one of the photos"),
        (["RUNS/regulated", "PHOTO", "PHOTO", "--out", "x.png"], "a picture shows one photo"),
        (["RUNS/regulated", "PHOTO", "--labels", "RUNS"], "no such file"),
        (["RUNS/regulated", "PHOTO", "--taps", "encoder.0"], "--taps says how to read a network"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(
    arguments: list[str],
    words: str,
    srdeploy: Verb,
    runs: Path,
    photo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"RUNS": str(runs), "PHOTO": str(photo)}
    for name, place in places.items():
        arguments = [word.replace(name, place) for word in arguments]
    code, out, err = srdeploy("inspect", *arguments)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1
    assert out == ""
    assert list(tmp_path.iterdir()) == []


# What each exit sees


def test_a_page_is_written_with_a_picture_for_every_exit(
    srdeploy: Verb, runs: Path, photo: Path, truth: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    code, out, err = srdeploy(
        *("inspect", runs / "regulated", photo, "--labels", truth, "--out", page)
    )
    assert code == 0
    assert f"wrote {page}" in err
    assert "encoder.4" in out
    found = Resources()
    found.feed(page.read_text())
    assert found.outside == []
    maps = [alt for alt in found.alts if alt.endswith("contrast of the features")]
    masks = [alt for alt in found.alts if "segmentation." in alt]
    assert (len(maps), len(masks)) == (5, 6)
    assert "val_00.png: ground truth" in found.alts
    assert f"srdeploy inspect {runs}/regulated {photo}" in page.read_text()


def test_the_baseline_stands_above_the_run_and_says_that_no_exit_was_trained(
    srdeploy: Verb, runs: Path, photo: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    code, out, _ = srdeploy(
        *("inspect", runs / "regulated", photo, "--before", runs / "baseline"),
        *("--out", page, "--json"),
    )
    assert code == 0
    text = page.read_text()
    before, after = text.index("<h3>Before: baseline"), text.index("<h3>After: regulated")
    assert before < text.index("no exit was trained on it") < after
    assert text.count("no segmenter was trained here") == 5
    baseline, regulated = json.loads(out)["photos"][0]["runs"]
    assert [one["exits_trained"] for one in (baseline, regulated)] == [False, True]
    assert [exit["name"] for exit in baseline["exits"]] == [
        exit["name"] for exit in regulated["exits"]
    ]
    assert all(exit["class_scores"] is None for exit in baseline["exits"])
    assert [exit["agreement"] for exit in baseline["exits"]] == [None] * 5 + [1.0]


def test_json_gives_the_figures_of_every_exit_and_writes_nothing_unasked(
    srdeploy: Verb, runs: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = srdeploy("inspect", runs / "regulated", photo, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["out"] is None
    assert list(tmp_path.iterdir()) == []
    exits = found["photos"][0]["runs"][0]["exits"]
    assert [exit["role"] for exit in exits] == ["tap"] * 5 + ["output"]
    assert [exit["stride"] for exit in exits] == [1, 2, 4, 8, 16, None]
    for exit in exits:
        assert set(exit["class_scores"]) == {"field", "box", "disc"}
        assert list(exit["class_scores"].values()) == sorted(
            exit["class_scores"].values(), reverse=True
        )
        assert 0 <= exit["agreement"] <= 1


def test_without_out_the_page_is_named_after_the_photo(
    srdeploy: Verb, runs: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert srdeploy("inspect", runs / "regulated", photo)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["inspect-val_00.html"]


def test_the_output_scores_full_marks_against_its_own_segmentation(
    srdeploy: Verb, runs: Path, photo: Path, tmp_path: Path
) -> None:
    view = view_photos(load_subjects(runs / "regulated", None, "cpu"), [photo], None)[0]
    labels = view.runs[0].exits[-1].labels
    assert labels is not None
    mask = tmp_path / "val_00.png"
    mask.write_bytes(encode_mask(labels, open_run(runs / "regulated").spec))
    code, out, _ = srdeploy("inspect", runs / "regulated", photo, "--labels", tmp_path, "--json")
    assert code == 0
    exits = json.loads(out)["photos"][0]["runs"][0]["exits"]
    assert (exits[-1]["pixel_accuracy"], exits[-1]["miou"]) == (1.0, 1.0)
    for exit in exits:
        assert exit["pixel_accuracy"] == pytest.approx(exit["agreement"])


def test_a_mask_of_another_size_is_refused_by_name(
    srdeploy: Verb, runs: Path, photo: Path, tmp_path: Path
) -> None:
    mask = tmp_path / "mask.png"
    Image.new("L", (20, 20)).save(mask)
    code, _, err = srdeploy("inspect", runs / "regulated", photo, "--labels", mask)
    assert code == 2
    assert f"{mask} is 20x20" in err


def test_runs_of_different_classes_are_not_compared(
    srdeploy: Verb, runs: Path, photo: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("config.yaml", "network.safetensors"):
        (other / name).write_bytes((runs / "baseline" / name).read_bytes())
    spec = json.loads((runs / "baseline" / "spec.json").read_text())
    spec["classes"][1] = "crate"
    (other / "spec.json").write_text(json.dumps(spec))
    code, _, err = srdeploy("inspect", runs / "regulated", photo, "--before", other)
    assert code == 2
    assert "different classes ('crate' and 'box')" in err


def test_names_are_shown_as_they_are(
    srdeploy: Verb, runs: Path, photo: Path, tmp_path: Path
) -> None:
    odd = tmp_path / "a<b>&'$x_1$ 写真.png"
    odd.write_bytes(photo.read_bytes())
    page, picture = tmp_path / "page.html", tmp_path / "picture.png"
    assert srdeploy("inspect", runs / "regulated", odd, "--out", page)[0] == 0
    assert srdeploy("inspect", runs / "regulated", odd, "--out", picture)[0] == 0
    text = page.read_text()
    assert "a&lt;b&gt;&amp;&#39;$x_1$ 写真.png" in text
    assert "a<b>" not in text


def test_a_photo_of_any_size_is_shown_upright_and_no_larger_than_needed(
    srdeploy: Verb, runs: Path, tmp_path: Path
) -> None:
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (90, 1300), "green").save(turned, exif=exif)
    subjects = load_subjects(runs / "regulated", None, "cpu")
    view = view_photos(subjects, [turned], None)[0]
    assert view.size == (90, 1300)
    assert view.photo.shape == (44, 640, 3)
    assert shown_size((90, 1300)) == (44, 640)
    labels = view.runs[0].exits[-1].labels
    assert labels is not None
    assert labels.shape == (90, 1300)


# The pictures themselves


def planted(covered: tuple[int, int] = (48, 72)) -> ExitView:
    """A tap of stride 4 on an image of 48 x 72: bright in cells [4:6, 10:12] alone."""
    heat = np.zeros((covered[0] // 4, covered[1] // 4), np.float32)
    heat[4:6, 10:12] = 1
    return ExitView(
        name="tap",
        role="tap",
        channels=3,
        stride=4,
        heat=heat,
        size=(48, 72),
        covered=covered,
        labels=None,
        presence=None,
        agreement=None,
    )


@pytest.mark.parametrize("scale", [1, 2], ids=["same size", "larger"])
@pytest.mark.parametrize("covered", [(48, 72), (64, 96)], ids=["fits", "padded"])
def test_the_heat_map_is_bright_exactly_where_the_feature_is(
    covered: tuple[int, int], scale: int
) -> None:
    photo = np.zeros((48 * scale, 72 * scale, 3), np.uint8)
    bright = heat_picture(planted(covered), photo, 0.0).sum(axis=2) > 384
    expected = np.zeros((48, 72), bool)
    expected[16:24, 40:48] = True
    np.testing.assert_array_equal(bright, expected.repeat(scale, 0).repeat(scale, 1))


def test_a_blended_heat_map_lets_the_photo_through() -> None:
    photo = np.zeros((48, 72, 3), np.uint8)
    photo[:24] = 200
    blended = heat_picture(planted(), photo, 0.5).astype(int)
    plain = heat_picture(planted(), photo, 0.0).astype(int)
    assert np.abs(2 * blended - plain - photo).max() <= 1


def test_the_figure_shows_the_photo_and_the_maps_in_their_colours(
    runs: Path, photo: Path, truth: Path
) -> None:
    subjects = load_subjects(runs / "regulated", runs / "baseline", "cpu")
    view = view_photos(subjects, [photo], truth)[0]
    figure = np.asarray(Image.open(BytesIO(figure_png(view, 0.0))).convert("RGB"), np.int64)
    colours = set(np.unique(figure @ (65536, 256, 1)).tolist())
    expected = heat_picture(view.runs[1].exits[4], view.photo, 0.0).astype(np.int64)
    for wanted in (expected, np.array(open_run(runs / "regulated").spec.palette)):
        assert set(np.unique(wanted @ (65536, 256, 1)).tolist()) <= colours


def test_one_photo_gives_one_figure_file(
    srdeploy: Verb, runs: Path, photo: Path, tmp_path: Path
) -> None:
    out = tmp_path / "figure.png"
    code, _, _ = srdeploy("inspect", runs / "baseline", photo, "--out", out, "--blend", "0.4")
    assert code == 0
    assert read_photo(out).shape[1] > 1000
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_browser_shows_the_page_and_enlarges_its_pictures(
    width: int,
    scheme: Any,
    runs: Path,
    photo: Path,
    srdeploy: Verb,
    tmp_path: Path,
    browser_path: str,
) -> None:
    from playwright.sync_api import sync_playwright

    out = tmp_path / "page.html"
    subject, before = runs / "regulated", runs / "baseline"
    assert srdeploy("inspect", subject, photo, "--before", before, "--out", out)[0] == 0
    faults: list[str] = []
    asked: list[str] = []
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=browser_path, args=arguments)
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(out.as_uri())
        broken = page.evaluate(
            "async () => { const all = [...document.querySelectorAll('.gallery img')];"
            " all.forEach(i => i.loading = 'eager');"
            " await Promise.all(all.map(i => i.decode().catch(() => 0)));"
            " return all.filter(i => !i.naturalWidth).length; }"
        )
        overflow = page.evaluate("document.documentElement.scrollWidth > window.innerWidth")
        button = page.locator(".gallery button").nth(1)
        small = button.bounding_box()
        button.focus()
        page.keyboard.press("Enter")
        large = page.locator("dialog[open] img").bounding_box()
        told = page.locator("dialog p").inner_text()
        page.keyboard.press("Escape")
        left_open = page.locator("dialog[open]").count()
        browser.close()
    assert faults == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert (broken, overflow, left_open) == (0, False, 0)
    assert small is not None
    assert large is not None
    assert large["width"] > small["width"]
    assert large["x"] >= 0
    assert large["x"] + large["width"] <= width
    assert "exit 1: contrast of the features" in told
