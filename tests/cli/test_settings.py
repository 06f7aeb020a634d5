"""Rarely changed settings: `--set`, configuration files, and the flags that they replaced."""

from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from srdeploy.cli.main import app
from srdeploy.cli.settings import (
    EngineSettings,
    ExportSettings,
    PredictionSettings,
    ServerSettings,
    load_settings,
)
from srdeploy.cli.verbs import MOVED
from srdeploy.errors import UserError
from srdeploy.serve.server.config import ServerLimits
from srdeploy.validation import Settings, parse_options, setting_flags

Verb = Callable[..., tuple[int, str, str]]
MODELS: dict[str, type[Settings]] = {
    "export": ExportSettings,
    "predict": PredictionSettings,
    "serve": ServerSettings,
}


@pytest.mark.parametrize("verb", list(MODELS))
def test_every_flag_that_moved_is_a_setting_and_no_option(verb: str) -> None:
    command = getattr(typer.main.get_command(app), "commands")[verb]  # noqa: B009
    assert set(MOVED[verb]) == set(MODELS[verb].model_fields)
    assert not set(MOVED[verb]) & {param.name for param in command.params}


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (("export", "run", "--max-batch", "3"), "--max-batch is a setting now: give --set max_b"),
        (("export", "run", "--refittable"), "--set refittable=VALUE"),
        (("serve", "run", "--timeout=3"), "--timeout is a setting now: give --set timeout=VALUE"),
        (("predict", "run", "photos", "--ray-address", "head:1"), "--set ray_address=VALUE"),
    ],
)
def test_an_old_flag_says_where_it_went(
    srdeploy: Verb, words: tuple[str, ...], remedy: str
) -> None:
    code, out, err = srdeploy(*words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert remedy in err


def test_after_a_double_dash_nothing_is_a_flag(srdeploy: Verb) -> None:
    code, _, err = srdeploy("predict", "no-run", "--out", "masks", "--", "--list")
    assert code == 2
    assert "no such file or folder" in err


def test_settings_of_the_command_line_win_over_those_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text("max_batch: 8\nprofile: [1x32x32, 1x64x64]\nworkspace: 2\n")
    found = load_settings(ExportSettings, ["max_batch=2", "target=cpu"], file, EngineSettings)
    assert (found.max_batch, found.workspace, found.target) == (2, 2.0, "cpu")
    assert found.profile == ("1x32x32", "1x64x64")


def test_one_profile_needs_no_list() -> None:
    shapes = "1x32x32,1x360x480,4x720x960"
    assert load_settings(ExportSettings, [f"profile={shapes}"]).profile == (shapes,)


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text("# all defaults\n")
    assert load_settings(ServerSettings, (), file) == ServerSettings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_bach: 3", "engine.yaml: unknown key 'max_bach': did you mean 'max_batch'?"),
        ("max_batch: 0", "engine.yaml: 'max_batch' is '0': input should be greater than"),
        ("target: cpu", "engine.yaml: unknown key 'target'"),
        ("- a", "engine.yaml: a YAML mapping of keys to values is needed"),
        ("a: [", "engine.yaml: not valid YAML (line 1)"),
    ],
)
def test_a_fault_in_a_file_is_named_with_file_and_key(
    tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_settings(ExportSettings, (), file, EngineSettings)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_wating=3", "--set: unknown key 'max_wating': did you mean 'max_waiting'?"),
        ("timeout=soon", "--set: 'timeout' is 'soon'"),
        ("timeout", "--set timeout: needs KEY=VALUE"),
    ],
)
def test_a_fault_in_a_setting_is_named_with_its_key(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_settings(ServerSettings, [text])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "words", [("export", "no-run", "--engine-config"), ("serve", "no-run", "--server-config")]
)
def test_a_faulty_file_is_refused_before_anything_is_opened(
    srdeploy: Verb, tmp_path: Path, words: tuple[str, ...]
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("max_bach: 4\n")
    code, out, err = srdeploy(*words, file)
    assert (code, out) == (2, "")
    assert err == f"error: {file}: unknown key 'max_bach': did you mean 'max_batch'?\n"


def test_a_missing_file_is_one_line(srdeploy: Verb, tmp_path: Path) -> None:
    file = tmp_path / "none.yaml"
    code, out, err = srdeploy("serve", "night", "--server-config", file)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert str(file) in err


def test_a_servers_settings_reach_its_limits_and_the_others_keep_their_defaults() -> None:
    found = load_settings(ServerSettings, ["max_images=3", "drain=0", "threads=2"])
    assert ServerLimits(**found.limits()) == ServerLimits(images=3, drain_s=0)
    assert found.layout() == {"threads": 2}
    everything = ServerSettings(**dict.fromkeys(ServerSettings.model_fields, 1))
    assert set(everything.limits()) == set(ServerLimits.model_fields)


@pytest.mark.parametrize("value", ["a path", "12", "yes", "a: b", 3, 0.5, True, ["a", "b"]])
def test_settings_written_as_flags_are_read_back_equal(value: object) -> None:
    flag, text = setting_flags({"key": value})
    assert flag == "--set"
    assert parse_options([text], flag) == {"key": value}
