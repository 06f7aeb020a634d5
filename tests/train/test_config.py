"""Training configuration: layers, messages, and what may change on resume."""

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from srdeploy.errors import UserError
from srdeploy.runs import NetworkConfig
from srdeploy.train.config import (
    TrainConfig,
    check_resumable,
    flat,
    load_config,
    merge,
    nested,
)
from srdeploy.train.optimize import learning_rate
from srdeploy.validation import validated

pytestmark = pytest.mark.wheel
DATA = {"data": "somewhere"}


def test_a_file_beats_defaults_flags_beat_the_file_and_set_beats_flags(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("steps: 11\nbatch: 3\nlr: 0.5\nnetwork: {name: unet, options: {width: 4}}\n")
    config = load_config(
        file=file, flags={**DATA, "batch": 5, "lr": 0.25}, settings=["lr=0.125", "seed=7"]
    )
    assert (config.steps, config.batch, config.lr, config.seed) == (11, 5, 0.125, 7)
    assert config.power == TrainConfig(data=Path("x")).power


def test_set_reaches_nested_keys_and_keeps_their_neighbours() -> None:
    config = load_config(
        flags={**DATA, "network.name": "unet", "regulation.enabled": False},
        settings=["regulation.srf_weight=0.3", "network.options.width=4", "crop=[64, 96]"],
    )
    assert config.regulation.srf_weight == 0.3
    assert not config.regulation.enabled
    assert config.network == NetworkConfig(name="unet", options={"width": 4})
    assert config.crop == (64, 96)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("regulation.srf_wieght=0.1", r"--set regulation.srf_wieght=0.1: unknown key "
         r"'regulation.srf_wieght': did you mean 'srf_weight'\?"),
        ("step=5", r"--set step=5: unknown key 'step': did you mean 'steps'\?"),
        ("steps=many", r"--set steps=many: 'steps' is 'many': .*integer"),
        ("steps", r"--set steps: needs KEY=VALUE"),
        ("a..b=1", r"--set a\.\.b=1: needs KEY=VALUE"),
        ("lr=.inf", r"--set lr=.inf: 'lr' is 'inf': input should be a finite number"),
        ("scale=[1, .inf]", r"'scale.1' is 'inf': input should be a finite number"),
        ("mean=[104, 117, 123]", r"'mean.0' is '104': input should be less than or equal to 1"),
        ("std=[.inf, 1, 1]", r"'std.0' is 'inf': input should be a finite number"),
        ("crop=big", r"'crop' is 'big': a crop is HEIGHTxWIDTH"),
        ("scale=[2, 1]", r"scale is \(smallest, largest\)"),
        ("class_weights=median", r"'class_weights' is 'median': input should be 'none' or"),
        ("crop=[1", r"--set crop=\[1: the value is not valid YAML"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_refused_in_one_line_that_names_it(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_config(flags=DATA, settings=["seed=1", setting])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepps: 5\n", r"c\.yaml: unknown key 'stepps': did you mean 'steps'\?"),
        ("- 1\n- 2\n", r"c\.yaml: a configuration is a YAML mapping"),
        ("steps: [1\nlr: 2\n", r"c\.yaml: not valid YAML \(line \d+"),
        ("network: unet\n", r"c\.yaml: 'network' is 'unet'"),
    ],
)
def test_a_wrong_file_is_refused_by_its_name(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(file=file, flags=DATA)


def test_an_absent_file_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file or folder: .*none\.yaml"):
        load_config(file=tmp_path / "none.yaml", flags=DATA)


def test_values_that_only_fit_together_may_come_one_by_one() -> None:
    config = load_config(
        flags=DATA, settings=["regulation.seg_weight=0", "regulation.srf_weight=0"]
    )
    assert config.regulation.seg_weight == 0


def test_a_configuration_survives_yaml() -> None:
    config = TrainConfig(data=Path("d"), crop=(64, 96), pretrained_missing=("layer4",))
    assert validated(TrainConfig, yaml.safe_load(config.to_yaml()), "x") == config


@pytest.mark.parametrize("text", ["64x96", "64X96", " 64 x 96 "])
def test_a_crop_is_read_as_height_by_width(text: str) -> None:
    assert load_config(flags={**DATA, "crop": text}).crop == (64, 96)


def test_numbers_in_exponent_form_are_numbers() -> None:
    assert load_config(flags=DATA, settings=["lr=1e-3"]).lr == 1e-3


def test_resuming_names_the_key_that_differs() -> None:
    saved = load_config(flags=DATA)
    wanted = load_config(flags=DATA, settings=["regulation.srf_weight=0.3"])
    message = "runs/a was started with regulation.srf_weight=0.2, not 0.3"
    with pytest.raises(UserError, match=re.escape(message)):
        check_resumable(saved, wanted, Path("runs/a"))


def test_resuming_may_change_what_changes_no_number() -> None:
    saved = load_config(flags=DATA)
    other = ["device=cpu", "workers=0", "cache_mib=1", "data=elsewhere"]
    check_resumable(saved, load_config(flags=DATA, settings=other), Path("runs/a"))


@given(
    steps=st.integers(1, 500),
    warm_up=st.integers(0, 50),
    power=st.floats(0, 3),
    data=st.data(),
)
@settings(max_examples=50, deadline=None)
def test_the_learning_rate_is_warm_up_times_poly_decay(
    steps: int, warm_up: int, power: float, data: st.DataObject
) -> None:
    step = data.draw(st.integers(0, steps - 1))
    config = TrainConfig(data=Path("d"), steps=steps, warm_up=warm_up, power=power, lr=0.5)
    expected = 0.5 * ((steps - step) / steps) ** power
    if step < warm_up:
        expected *= (step + 1) / (warm_up + 1)
    assert learning_rate(config, step) == pytest.approx(expected, rel=1e-12)


def test_the_learning_rate_at_known_steps() -> None:
    config = TrainConfig(data=Path("d"), steps=100, warm_up=0, lr=0.01)
    assert learning_rate(config, 0) == 0.01
    # 0.01 * 0.5 ** 0.9 and 0.01 * 0.01 ** 0.9, by hand.
    assert learning_rate(config, 50) == pytest.approx(0.005358867312681466, rel=1e-12)
    assert learning_rate(config, 99) == pytest.approx(0.00015848931924611135, rel=1e-12)


KEYS = st.text("abc", min_size=1, max_size=2)
TREES = st.recursive(
    st.integers(), lambda children: st.dictionaries(KEYS, children, min_size=1, max_size=3)
)
MAPPINGS = st.dictionaries(KEYS, TREES, max_size=3)


@given(below=MAPPINGS, key=st.lists(KEYS, min_size=1, max_size=3).map(".".join))
@settings(max_examples=50, deadline=None)
def test_merging_one_key_changes_that_key_and_no_leaf_beside_it(
    below: dict[str, object], key: str
) -> None:
    merged = flat(merge(below, nested(key, "new")))
    assert merged[key] == "new"
    before = flat(below)
    for name in before:
        inside = name == key or name.startswith(f"{key}.") or key.startswith(f"{name}.")
        assert inside or merged[name] == before[name]
