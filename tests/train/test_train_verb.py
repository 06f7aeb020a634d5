"""`srdeploy train` as people call it."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from srdeploy.cli import train_verbs
from srdeploy.errors import UserError
from srdeploy.runs import open_run

pytestmark = pytest.mark.wheel

QUICK = [
    *("--network", "unet", "--steps", "2", "--batch", "2", "--crop", "32x40", "--workers", "0"),
    *("--device", "cpu", "--set", "network.options.width=4", "--set", "regulation.width=4"),
]


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.callback()(_root)
    train_verbs.register(app)
    return app


def _root() -> None:
    """The command above the verbs."""


def test_json_is_one_object_and_the_only_thing_on_stdout(
    app: typer.Typer, tiny_data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    result = CliRunner().invoke(app, ["train", str(tiny_data), "--out", str(out), *QUICK, "--json"])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["folder"] == str(out)
    assert summary["steps"] == 2
    assert summary["finished"]
    assert 0 <= summary["best_miou"] <= 1


def test_sr_is_the_only_key_in_which_two_runs_differ(
    app: typer.Typer, tiny_data: Path, tmp_path: Path
) -> None:
    for flag in ("--sr", "--no-sr"):
        arguments = ["train", str(tiny_data), "--out", str(tmp_path / flag), *QUICK, flag, "-q"]
        assert CliRunner().invoke(app, arguments).exit_code == 0
    ours, theirs = (open_run(tmp_path / flag).config for flag in ("--sr", "--no-sr"))
    assert ours["regulation"].pop("enabled")
    assert not theirs["regulation"].pop("enabled")
    assert ours == theirs


def test_a_runs_own_configuration_repeats_it(
    app: typer.Typer, tiny_data: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    arguments = ["train", str(tiny_data), "--out", str(first), *QUICK, "-q"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    arguments = ["train", "--config", str(first / "config.yaml"), "--out", str(second), "-q"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    name = "network.safetensors"
    assert (first / name).read_bytes() == (second / name).read_bytes()


def test_resume_takes_the_configuration_from_the_run(
    app: typer.Typer, tiny_data: Path, tmp_path: Path
) -> None:
    out = str(tmp_path / "run")
    assert (
        CliRunner().invoke(app, ["train", str(tiny_data), "--out", out, *QUICK, "-q"]).exit_code
        == 0
    )
    result = CliRunner().invoke(app, ["train", "--out", out, "--resume", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["steps"] == 2
    result = CliRunner().invoke(app, ["train", "--out", out, "--resume", "--lr", "0.5"])
    assert isinstance(result.exception, UserError)
    assert "was started with lr=0.01, not 0.5" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "stepps=3"], "--set stepps=3: unknown key 'stepps': did you mean 'steps'?"),
        (["--steps", "0"], "--steps: 'steps' is '0': input should be greater than or equal to 1"),
        (["--crop", "big"], "--crop: 'crop' is 'big': a crop is HEIGHTxWIDTH"),
        (["--network", "segnett"], "unknown network 'segnett': did you mean 'segnet'?"),
    ],
)
def test_a_wrong_flag_is_refused_by_its_name(
    app: typer.Typer, tiny_data: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    out = tmp_path / "run"
    result = CliRunner().invoke(app, ["train", str(tiny_data), "--out", str(out), *arguments])
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)
    assert not out.exists()


def test_without_data_the_usage_is_told(app: typer.Typer, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["train", "--out", str(tmp_path / "run")])
    assert isinstance(result.exception, UserError)
    assert str(result.exception) == "no data set given: srdeploy train DATA --out RUN"


BROKEN = """
from torch import nn

class Network(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU())
        self.head = nn.Conv2d(4, classes, 1)

    def forward(self, images):
        features = self.stem(images)
        features += 1  # the ReLU's backward needs what stood there
        return self.head(features)
"""


def test_a_network_that_fails_in_its_backward_is_named_in_one_line(
    app: typer.Typer, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_backward.py").write_text(BROKEN)
    monkeypatch.chdir(tmp_path)
    arguments = ["--network", "broken_backward:Network", "--out", "run", *QUICK[2:10]]
    arguments += ["--no-sr", "--device", "cpu"]
    result = CliRunner().invoke(app, ["train", str(tiny_data), *arguments])
    assert isinstance(result.exception, UserError), result.exception
    assert "'broken_backward:Network': a step of training failed (one of" in str(result.exception)
