"""`srdeploy bench train`: a verb of two words, its table and its JSON."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from srdeploy import console
from srdeploy.cli.bench_train_verb import step_table
from srdeploy.cli.main import app as whole_app
from srdeploy.cli.verbs import SubcommandGroup
from srdeploy.metrics import Interval
from srdeploy.train.step_cost import VARIANTS, Memory, StepCost, VariantCost

Verb = Callable[..., tuple[int, str, str]]

SMALL = ["--option", "width_mult=0.25", "--size", "32x48", "--classes", "3", "--rounds", "3"]


@pytest.fixture
def known_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of fresh processes, which tests/train/test_step_cost.py tries."""
    mib = {"baseline": 100.0, "mea": 110.0, "lean": 125.0, "authors": 200.0}

    def known(name: str, *_: Any) -> Memory:
        return Memory(mib[name], mib[name] + 300)

    monkeypatch.setattr("srdeploy.train.step_cost.memory_of", known)


@pytest.mark.usefixtures("known_memory")
def test_all_variants_step_through_the_compiler_where_that_is_asked(
    srdeploy: Verb, monkeypatch: pytest.MonkeyPatch
) -> None:
    # tests/train/test_compiled.py compiles in earnest, which takes long.
    handed: list[str] = []

    def as_it_is(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        handed.append(function.__name__)
        return function

    monkeypatch.setattr("torch.compile", as_it_is)
    code, text, _ = srdeploy("bench", "train", *SMALL, "--compile", "--json")
    assert code == 0
    assert StepCost.model_validate_json(text).compiled
    assert handed.count("_collect") == len(VARIANTS) + 1, "the baseline twice"
    assert handed.count("forward") == len(VARIANTS) - 1, "the baseline has no exits"


def test_the_first_two_words_are_tried_before_the_first() -> None:
    app = typer.Typer(cls=SubcommandGroup)

    @app.command("bench")
    def bench(artifacts: list[str]) -> None:
        typer.echo(f"bench {artifacts}")

    @app.command("bench train")
    def bench_train(network: str = typer.Argument("default")) -> None:
        typer.echo(f"bench train {network}")

    def said(*words: str) -> str:
        return CliRunner().invoke(app, words).output.strip()

    assert said("bench", "train") == "bench train default"
    assert said("bench", "train", "unet") == "bench train unet"
    assert said("bench", "./train", "b") == "bench ['./train', 'b']"
    assert said("bench", "a", "train") == "bench ['a', 'train']"
    assert "Missing argument" in said("bench")
    assert "No such command 'benhc'" in said("benhc", "train")


def test_help_lists_both_verbs_and_usage_names_both_words() -> None:
    wide = {"COLUMNS": "200"}
    listed = CliRunner().invoke(whole_app, ["--help"], env=wide).output
    rows = [line.strip("│ ").split("  ")[0] for line in listed.splitlines()]
    assert {"bench", "bench train", "train"} <= set(rows)
    shown = CliRunner().invoke(whole_app, ["bench", "train", "--help"], env=wide).output
    assert "Usage: srdeploy bench train [OPTIONS] [network]" in " ".join(shown.split())
    assert "Example: srdeploy bench train" in shown
    for row in ("baseline:", "mea:", "lean:", "authors:"):
        assert row in shown


@pytest.mark.usefixtures("known_memory")
def test_json_and_the_file_hold_every_step_of_every_variant(srdeploy: Verb, tmp_path: Path) -> None:
    out = tmp_path / "new" / "cost.json"
    code, text, err = srdeploy("bench", "train", *SMALL, "--threads", 1, "--json", "--out", out)
    assert (code, err) == (0, "")
    assert json.loads(text) == json.loads(out.read_text())
    found = StepCost.model_validate_json(text)
    assert (found.network, found.size) == ("deeplabv2-mobilenetv2", (32, 48))
    assert found.options == {"width_mult": 0.25}
    assert (found.classes, found.batch, found.rounds, found.threads) == (3, 2, 3, 1)
    assert (found.device, found.arithmetic, found.layout) == ("cpu", "float32", "NCHW")
    assert [row.name for row in found.variants] == ["baseline", "mea", "lean", "authors"]
    assert [row.memory_ratio for row in found.variants] == [1.0, 1.1, 1.25, 2.0]
    baseline, mea, lean, authors = found.variants
    assert baseline.parameters_added == 0
    assert 0 < mea.parameters_added == lean.parameters_added < authors.parameters_added
    for row in found.variants:
        assert [len(one) for one in row.rounds_ms] == [2, 2, 2]
        steps = sorted(step for one in row.rounds_ms for step in one)
        assert row.median_ms == pytest.approx((steps[2] + steps[3]) / 2)
        assert (row.time is None) == (row is baseline)
    assert found.floor.low <= found.floor.value <= found.floor.high


def cost(device: str = "cpu", process: float | None = 400.0) -> StepCost:
    """Figures made up; mea's times never settled."""
    rows = {"baseline": (10.0, 0), "mea": (11.0, 1000), "lean": (12.5, 1000), "authors": (20.0, 9)}
    return StepCost(
        network="unet",
        options={},
        parameters=20_000,
        classes=3,
        size=(32, 48),
        batch=2,
        rounds=7,
        device=device,
        arithmetic="float32",
        layout="NCHW",
        threads=2,
        variants=tuple(
            VariantCost(
                name=name,
                description=VARIANTS[name].description,
                parameters_added=added,
                median_ms=median,
                time=Interval(value=median / 10, low=median / 11, high=median / 9)
                if added
                else None,
                settled=name != "mea",
                memory_mib=10 * median,
                memory_ratio=median / 10,
                process_mib=process,
                rounds_ms=((median, median),) * 7,
            )
            for name, (median, added) in rows.items()
        ),
        floor=Interval(value=1.001, low=0.99, high=1.02),
        environment={},
    )


def shown(found: StepCost, capsys: pytest.CaptureFixture[str]) -> list[str]:
    console.print_table(step_table(found))
    return capsys.readouterr().out.splitlines()


def test_the_table_says_which_row_is_which_and_what_is_noise(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = shown(cost(), capsys)
    assert max(map(len, lines)) <= 120
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if "│" in line]
    assert rows == [
        ["baseline", "10.0", "1", "100", "1.000", "0"],
        ["mea", "11.0", "1.100 [1.000, 1.222]", "110", "1.100", "1,000 (5.0 %)"],
        ["lean", "12.5", "1.250 [1.136, 1.389]", "125", "1.250", "1,000 (5.0 %)"],
        ["authors", "20.0", "2.000 [1.818, 2.222]", "200", "2.000", "9 (0.0 %)"],
    ]
    text = " ".join(" ".join(lines).split())
    for words in (
        "one training step: unet, 3 classes, batch 2 of 32x48",
        f"lean: {VARIANTS['lean'].description}",
        "7 rounds, two steps of each",
        "noise floor, the baseline's time against itself: 1.001 [0.990, 1.020]",
        "above what the process held",
        "on cpu, 2 CPU threads, float32, NCHW",
        "never settled while warming up: mea",
    ):
        assert words in text


def test_on_a_gpu_the_table_says_whose_memory_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(shown(cost("cuda:0, NVIDIA L4", None), capsys))
    assert "on cuda:0, NVIDIA L4" in text
    assert "torch's allocator" in text
    assert "above what the process held" not in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["u-net"], "unknown network 'u-net': did you mean 'unet'?"),
        (["--size", "31x64"], "--size 31x64: too small"),
        (["--size", "big"], "--size 'big': height x width in pixels is needed"),
        (["--batch", "1"], "--batch 1: BatchNorm can't be trained on one image"),
        (["--device", "cuda:99"], "device cuda:99 was asked for"),
        (["--option", "width"], "--option width: needs KEY=VALUE"),
    ],
)
def test_what_cannot_be_measured_is_one_line_and_exit_code_2(
    srdeploy: Verb, arguments: list[str], words: str
) -> None:
    code, out, err = srdeploy("bench", "train", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {words}")
    assert err.count("\n") == 1
