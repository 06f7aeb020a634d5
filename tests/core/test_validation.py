"""Errors of configuration name the place, the key, the value and the remedy in one line."""

from typing import Any

import pytest
from pydantic import Field, ValidationError

from srdeploy.errors import UserError
from srdeploy.validation import Settings, closest, parse_size, validated


class Inner(Settings):
    rate: float = Field(default=0.1, gt=0)


class Outer(Settings):
    steps: int
    inner: Inner = Inner()
    parts: tuple[Inner, ...] = ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "'steps' is missing"),
        ({"steps": "many"}, "'steps' is 'many': input should be a valid integer"),
        ({"steps": 1, "inner": {"rate": -1}}, "'inner.rate' is '-1': input should be greater than"),
        ({"steps": 1, "step": 2}, "unknown key 'step': did you mean 'steps'?"),
        ({"steps": 1, "inner": {"rte": 2}}, "unknown key 'inner.rte': did you mean 'rate'?"),
        ({"steps": 1, "parts": [{"rte": 2}]}, "unknown key 'parts.0.rte': did you mean 'rate'?"),
        ({"steps": 1, "zzz": 2}, "unknown key 'zzz': known: steps, inner, parts"),
        ([1], "a mapping of keys to values is needed, this is a list"),
        (None, "a mapping of keys to values is needed, this is a NoneType"),
    ],
)
def test_the_first_fault_is_told_in_one_line(values: Any, message: str) -> None:
    with pytest.raises(UserError) as raised:
        validated(Outer, values, "config.yaml")
    assert str(raised.value).startswith(f"config.yaml: {message}")
    assert "\n" not in str(raised.value)


def test_a_long_value_is_cut() -> None:
    with pytest.raises(UserError) as raised:
        validated(Outer, {"steps": "x" * 5000}, "config.yaml")
    assert len(str(raised.value)) < 300


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        setattr(Inner(), "rate", 2.0)  # noqa: B010


def test_the_closest_name_is_offered_and_else_all_of_them() -> None:
    assert closest("unet2", ["segnet", "unet"]) == "did you mean 'unet'?"
    assert closest("xyz", iter(["segnet", "unet"])) == "known: segnet, unet"


@pytest.mark.parametrize("text", ["360x480", "360X480", " 360 x 480 "])
def test_a_size_is_height_by_width(text: str) -> None:
    assert parse_size(text, "--size") == (360, 480)


@pytest.mark.parametrize("text", ["", "12", "axb", "0x5", "5x-5", "1.5x2", "4x4x4", "80x"])
def test_a_size_that_is_none_is_refused_with_the_option_named(text: str) -> None:
    with pytest.raises(UserError, match=f"^--size '{text}': height x width in pixels"):
        parse_size(text, "--size")
