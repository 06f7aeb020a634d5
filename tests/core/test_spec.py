"""The spec refuses what does not fit together and survives a trip through JSON."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srdeploy.errors import UserError
from srdeploy.spec import Spec
from srdeploy.validation import validated

GOOD: dict[str, Any] = {"classes": ["sky", "road"], "palette": [[0, 0, 255], [90, 90, 90]]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"palette": [[0, 0, 0]]}, "2 classes but 1 palette colours"),
        ({"palette": [[0, 0, 300], [0, 0, 0]]}, r"'palette\.0\.2' is '300'"),
        ({"classes": ["sky", "sky"]}, "'sky' stands twice"),
        ({"classes": ["sky"], "palette": [[0, 0, 0]]}, "'classes'"),
        ({"ignore_index": 1}, "ignore_index 1 is also the id of class 'road'"),
        ({"ignore_index": 256}, "'ignore_index' is '256'"),
        ({"scored": [2]}, r"scored class ids \[2\] are not among 0\.\.1"),
        ({"scored": []}, "must be one or more, each once"),
        ({"scored": [1, 1]}, "must be one or more, each once"),
        ({"mean": [123.7, 116.3, 103.5]}, r"'mean\.0' is '123\.7': input should be less than"),
        ({"std": [0.2, 0.2, 0]}, r"'std\.2' is '0'"),
        ({"std": [0.2, 0.2, float("inf")]}, r"'std\.2' is 'inf'"),
        ({"colour_order": "GRB"}, "'colour_order' is 'GRB'"),
        ({"version": 2}, "'version' is '2'"),
        ({"pallete": []}, "unknown key 'pallete': did you mean 'palette'"),
        ({"input": {"longest": 3}}, r"unknown key 'input\.longest': did you mean 'longest_side'"),
        ({"input": {"usual": [16, 512]}}, "sizes must grow: smallest"),
        ({"input": {"usual": [512, 4096]}}, "sizes must grow: smallest"),
    ],
)
def test_a_spec_that_does_not_fit_together_is_refused_with_the_reason(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=f"^spec.json: .*{message}"):
        validated(Spec, GOOD | change, "spec.json")


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(2, 20),
    order=st.sampled_from(["RGB", "BGR"]),
    mean=st.floats(0, 1),
    std=st.floats(1e-3, 10),
    longest=st.none() | st.integers(32, 4096),
)
def test_a_spec_survives_json_and_equal_specs_give_equal_text(
    count: int, order: str, mean: float, std: float, longest: int | None
) -> None:
    values = {
        "classes": [f"class {i}" for i in range(count)],
        "palette": [[i, 2 * i, 255 - i] for i in range(count)],
        "scored": list(range(0, count, 2)),
        "mean": [mean] * 3,
        "std": [std] * 3,
        "colour_order": order,
        "input": {"longest_side": longest},
    }
    spec = validated(Spec, values, "here")
    again = validated(Spec, json.loads(spec.to_json()), "there")
    assert again == spec
    assert again.to_json() == spec.to_json()
    assert "\n" not in spec.to_json()


def test_all_classes_are_scored_unless_some_are_named() -> None:
    assert validated(Spec, GOOD, "here").scored_ids == (0, 1)
    assert validated(Spec, GOOD | {"scored": [1]}, "here").scored_ids == (1,)
