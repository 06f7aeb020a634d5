"""`srdeploy train --supervision image` and `srdeploy pseudo` as people call them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from srdeploy.cli.main import app
from srdeploy.errors import UserError
from srdeploy.runs import open_run
from srdeploy.train.weak.from_tags import places, split_settings
from srdeploy.train.weak.pseudo_run import saved_pseudo_run
from tests.train.weak.scenes import write_scenes

TINY = [
    *("--option", "width_mult=0.25", "--steps", "2", "--batch", "4", "--crop", "64x64"),
    *("--device", "cpu", "--workers", "1", "--set", "val_every=2"),
]
QUICK = [
    *("--set", "pseudo.scales=[1]", "--set", "pseudo.flip=false"),
    *("--set", "pseudo.pamr_steps=1", "--set", "pseudo.pamr_dilations=[1]"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"))


def invoke(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.wheel
def test_one_verb_goes_from_tags_to_a_run(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["train", data, "--supervision", "image", "--out", out, *TINY, *QUICK, "--json"]
    summary = json.loads(invoke(*words, "--set", "classifier.steps=3"))
    assert summary["folder"] == str(out)
    assert summary["finished"]
    assert open_run(out).config["data"] == str(tmp_path / "run-pseudo")
    made = saved_pseudo_run(tmp_path / "run-pseudo")
    assert made is not None
    assert made.classifier.steps == 3
    assert made.classifier.data == data


def test_the_baseline_is_one_without_regulation_throughout(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    invoke("train", data, "--supervision", "image", "--out", out, *TINY, *QUICK, "--no-sr", "-q")
    assert not (out / "exits.safetensors").exists()
    made = saved_pseudo_run(tmp_path / "run-pseudo")
    assert made is not None
    assert not made.classifier.regulation.enabled


def test_a_second_round_is_taught_by_the_first(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["train", data, "--supervision", "image", "--out", out, *TINY, *QUICK, "-q"]
    invoke(*words, "--rounds", 2)
    second = saved_pseudo_run(tmp_path / "run-pseudo-2")
    assert second is not None
    assert second.teacher == tmp_path / "run-round-1"
    assert open_run(out).config["data"] == str(tmp_path / "run-pseudo-2")
    before = (out / "network.safetensors").read_bytes()
    invoke(*words, "--rounds", 2, "--resume")
    assert (out / "network.safetensors").read_bytes() == before


def test_rounds_lie_beside_the_run(tmp_path: Path) -> None:
    found = [(p.pseudo.name, p.run.name) for p in places(tmp_path / "x", 3)]
    assert found == [
        ("x-pseudo", "x-round-1"),
        ("x-pseudo-2", "x-round-2"),
        ("x-pseudo-3", "x"),
    ]


def test_a_file_may_hold_all_three_parts(tmp_path: Path) -> None:
    path = tmp_path / "all.yaml"
    parts = {"steps": 9, "classifier": {"steps": 5}, "pseudo": {"flip": False}}
    path.write_text(yaml.safe_dump(parts))
    settings = ["pseudo.background=0.4", "classifier.lr=0.1", "crop=64x64"]
    content, rest, classifier, pseudo = split_settings(path, settings)
    assert content == {"steps": 9}
    assert rest == ["crop=64x64"]
    assert classifier == {"steps": 5, "lr": 0.1}
    assert pseudo == {"flip": False, "background": 0.4}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--supervision", "imag"], "--supervision imag: did you mean 'image'?"),
        (["--labels-from-masks"], "--labels-from-masks belongs to --supervision image"),
        (["--rounds", "2"], "--rounds belongs to --supervision image"),
        (["--supervision", "image", "--rounds", "20"], "--rounds 20: 1 to 9"),
        (["--supervision", "image", "--set", "pseudo.colour=1"], "colour"),
        (["--supervision", "image", "--set", "classifier.stepz=1"], "did you mean 'steps'?"),
        (["--supervision", "image", "--resume", "--force"], "exclude each other"),
    ],
)
def test_what_can_not_be_is_refused_before_anything_is_written(
    data: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    with pytest.raises(UserError) as error:
        invoke("train", data, "--out", tmp_path / "run", *TINY, *words)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_there_is_not_trained_over(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not a run"):
        invoke("train", data, "--supervision", "image", "--out", out, *TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_pseudo_prints_one_json_object(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "made"
    report = json.loads(invoke("pseudo", data, "--out", out, *TINY, *QUICK, "--json"))
    assert report["folder"] == str(out)
    assert 0 <= report["splits"]["train"]["refined"]["miou"] <= 1
    again = json.loads(
        invoke("pseudo", "--out", out, "--only", "masks", "--set", "pseudo.certain=0", "--json")
    )
    assert again["certain"] == 0
    assert again["splits"]["train"]["ignored"] <= report["splits"]["train"]["ignored"]


def test_pseudo_without_data_says_what_is_missing(tmp_path: Path) -> None:
    words = ["-m", "srdeploy", "pseudo", "--out", str(tmp_path / "made")]
    result = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 2
    assert result.stderr.strip() == "error: no data set given: srdeploy pseudo DATA --out DIR"
    assert result.stdout == ""


def test_a_section_that_is_none_is_refused(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text("pseudo: 3\n")
    with pytest.raises(UserError, match="'pseudo' is a section of keys and values, not 3"):
        invoke("pseudo", data, "--out", tmp_path / "made", "--config", path)


def test_an_unknown_step_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--only mask: did you mean 'masks'"):
        invoke("pseudo", data, "--out", tmp_path / "made", "--only", "mask")


def test_the_page_of_the_worst_masks_stands_in_a_browser(
    data: Path, tmp_path: Path, browser_path: str
) -> None:
    """Every picture loads, nothing is fetched, and a phone needs no sideways scrolling."""
    from playwright.sync_api import sync_playwright

    invoke("pseudo", data, "--out", tmp_path / "made", *TINY, *QUICK, "-q")
    page_file = (tmp_path / "made/pseudo/worst.html").as_uri()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800})
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(page_file)
        loaded = "[...document.images].every(i => i.complete && i.naturalWidth > 0)"
        assert page.evaluate(loaded)
        assert page.evaluate("document.images.length") == 12 * 5
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        browser.close()
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
