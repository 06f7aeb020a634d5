"""The evidence script, tiny: every run once, resumed after a stop, and figures that can be checked
by hand."""

import importlib
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scipy import stats
from typer.testing import CliRunner

from srdeploy.cli.main import app

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
TINY = "--batch 2 --crop 32x40 --workers 0 --device cpu --set val_every=1"
TINY += " --set network.options.width=4 --set regulation.width=4"


@pytest.fixture(scope="module")
def scripts() -> dict[str, ModuleType]:
    """The benchmark's own modules, by name."""
    names = ("evidence", "evidence_figures", "evidence_variants", "journal")
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(BENCHMARKS))


class InThisProcess:
    """Stands in for the benchmarks' journal: the same commands, without a process for each."""

    def __init__(self) -> None:
        self.commands: list[dict[str, Any]] = []

    def run(self, *words: str | Path) -> dict[str, Any]:
        arguments = [str(word) for word in words]
        self.commands.append({"command": " ".join(["srdeploy", *arguments])})
        result = CliRunner().invoke(app, [*arguments, "--json"])
        assert result.exit_code == 0, result.output
        answer: dict[str, Any] = json.loads(result.stdout)
        return answer


@pytest.fixture
def split_data(tiny_data: Path, tmp_path: Path) -> Path:
    """The tiny set with a test split, the photos of val."""
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    for kind in ("images", "labels"):
        shutil.copytree(data / kind / "val", data / kind / "test")
    return data


def test_what_is_finished_is_kept_and_what_was_cut_off_is_resumed(
    scripts: dict[str, ModuleType],
    split_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(scripts["evidence"], "Journal", InThisProcess)
    folder = tmp_path / "evidence"
    common: dict[str, Any] = {"system": ["unet"], "variant": ["srf"], "train_words": TINY}
    common |= {"steps": 2, "seeds": 1, "folder": folder}
    scripts["evidence"].main(split_data, **common)
    report = json.loads((folder / "evidence.json").read_text())
    assert [run["variant"] for run in report["runs"]] == ["baseline", "srf"]
    assert report["runs_left"] == 0
    assert [step for step, _ in report["runs"][0]["curve"]] == [1, 2]
    assert (folder / "curves-unet.png").stat().st_size > 10_000
    assert "| srf | 1 |" in (folder / "evidence.md").read_text()

    # Cut off after training: scores are lost, the weights are not trained again.
    kept = folder / "unet" / "srf" / "seed-0.json"
    record = json.loads(kept.read_text())
    run = folder / "unet" / "srf" / "seed-0"
    written = (run / "network.safetensors").stat().st_mtime_ns
    kept.write_text(json.dumps({k: v for k, v in record.items() if k != "scores"}))
    scripts["evidence"].main(split_data, **common)
    again = json.loads((folder / "evidence.json").read_text())
    assert [one["command"] for one in again["commands"]] == [
        f"srdeploy train --resume --out {run}",
        f"srdeploy evaluate {run} {split_data} --split val",
        f"srdeploy evaluate {run} {split_data} --split test",
    ]
    assert (run / "network.safetensors").stat().st_mtime_ns == written
    assert json.loads(kept.read_text())["scores"] == record["scores"]

    # Other flags are another study.
    with pytest.raises(SystemExit, match=r"was made with words .* give another --folder"):
        scripts["evidence"].main(split_data, **common | {"steps": 3})

    # No run is begun once the time is over; what is finished counts, and the report says so.
    capsys.readouterr()
    scripts["evidence"].main(split_data, **common | {"seeds": 2}, minutes=0.0)
    late = json.loads((folder / "evidence.json").read_text())
    assert (len(late["runs"]), late["runs_left"], late["commands"]) == (2, 2, [])
    assert "**2 runs are left: the same command goes on.**" in capsys.readouterr().out


@pytest.mark.parametrize("test_split", ["val", "test+val"])
def test_weights_are_not_reported_on_the_split_that_selected_them(
    scripts: dict[str, ModuleType], split_data: Path, test_split: str
) -> None:
    with pytest.raises(SystemExit, match="--test-split must not be val"):
        scripts["evidence"].main(split_data, test_split=test_split)


def run_of(variant: str, seed: int, miou: float, failure2: float | None = 0.1) -> dict[str, Any]:
    scores = {"miou": miou, "failure1": 0.5, "failure2": failure2}
    return {"variant": variant, "seed": seed, "scores": {"test": scores}}


def test_differences_are_paired_by_seed(scripts: dict[str, ModuleType]) -> None:
    ours, theirs = [0.50, 0.61, 0.72], [0.48, 0.60, 0.69]
    runs = [run_of("all", seed, one) for seed, one in enumerate(ours)]
    runs += [run_of("baseline", seed, one) for seed, one in enumerate(theirs)]
    runs.append(run_of("all", 3, 0.9))  # a seed that the baseline lacks
    found = scripts["evidence_figures"].summarised(runs)["all"]["test"]["miou"]
    assert found["seeds"] == [0, 1, 2, 3]
    mean, low, high = found["difference"]
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert mean == pytest.approx(0.02)
    assert (low, high) == pytest.approx((expected.low, expected.high))


def test_one_seed_has_no_interval_and_an_undefined_failure_is_left_out(
    scripts: dict[str, ModuleType],
) -> None:
    runs = [run_of("baseline", 0, 0.4), run_of("all", 0, 0.5, None)]
    found = scripts["evidence_figures"].summarised(runs)
    assert found["all"]["test"]["miou"]["difference"] == [pytest.approx(0.1), None, None]
    assert found["all"]["test"]["failure2"] == {"seeds": [], "mean": None, "difference": None}
    assert found["baseline"]["test"]["miou"]["difference"] is None
    found = {name: splits | {"val": splits["test"]} for name, splits in found.items()}
    text = scripts["evidence_figures"].tables({"unet": found}, 2, {"val": "val", "test": "test"}, 0)
    assert "| all | 1 | 50.00 | +10.00 | 50.00 | +0.00 | - | - |" in text


def test_every_variant_is_a_configuration_and_the_baseline_comes_first(
    scripts: dict[str, ModuleType],
) -> None:
    from srdeploy.train.config import load_config

    variants = scripts["evidence_variants"]
    seen = set()
    for name, words in variants.VARIANTS.items():
        flag, *rest = words
        assert set(rest[::2]) <= {"--set"}
        flags = {"data": "somewhere", "regulation.enabled": flag == "--sr"}
        seen.add(load_config(flags=flags, settings=rest[1::2]).regulation.model_dump_json())
        assert variants.chosen([name])[0] == "baseline"
    assert len(seen) == len(variants.VARIANTS)
    assert variants.chosen(["main", "forms"]) == [
        *("baseline", "mea", "srf", "srl", "all"),
        *("hard", "feature", "everywhere", "hard-everywhere"),
    ]
