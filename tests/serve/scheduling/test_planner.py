"""Which layout of sessions is chosen, and that it is one that was measured."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srdeploy.serve.scheduling import planner
from srdeploy.serve.scheduling.planner import (
    WORTH,
    WORTH_ALONE,
    Layout,
    Measured,
    Source,
    Wishes,
    choose,
    make_plan,
)

WIDE = Layout(sessions=1, threads=2)
NARROW = Layout(sessions=2, threads=1)


@pytest.fixture(autouse=True)
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "TRY_S", 0.005)


def measured(layout: Layout, batch: int, rate: float, alone: float | None = None) -> Measured:
    return Measured(layout=layout, batch=batch, images_per_s=rate, alone_ms=alone)


def test_many_requests_and_a_lone_one_get_what_serves_each_best() -> None:
    plan = choose([measured(WIDE, 1, 45, 22), measured(NARROW, 1, 50, 40)], 2)
    assert (plan.shared, plan.lone, plan.batch) == (NARROW, WIDE, 1)
    assert str(plan) == "2 sessions of 1 thread; 1 session of 2 threads for a lone request"


def test_a_lone_request_gets_no_session_of_its_own_where_that_gains_little() -> None:
    plan = choose([measured(WIDE, 1, 45, 38), measured(NARROW, 1, 50, 40)], 2)
    assert (plan.shared, plan.lone) == (NARROW, None)


def test_cores_are_left_for_decoding_where_layouts_are_as_fast() -> None:
    assert choose([measured(WIDE, 1, 50, 22), measured(NARROW, 1, 50, 40)], 2).shared == NARROW
    one, two = (Layout(sessions=count) for count in (1, 2))
    assert choose([measured(one, 1, 50, 22), measured(two, 1, 50, 22)], 2).shared == one


def test_batches_are_used_where_they_pay_and_only_there() -> None:
    small = measured(WIDE, 1, 100, 10)
    assert choose([small, measured(WIDE, 8, 300)], 2).batch == 8
    assert choose([small, measured(WIDE, 8, 90)], 2).batch == 1
    assert choose([small, measured(WIDE, 8, 101)], 2).batch == 1


figures = st.builds(
    measured,
    st.builds(Layout, sessions=st.integers(1, 4), threads=st.integers(1, 4)),
    st.just(1),
    st.floats(1, 1000),
    st.floats(1, 1000),
)


@given(st.lists(figures, min_size=1, max_size=6, unique_by=lambda one: one.layout))
def test_nothing_measured_is_much_better_than_what_is_chosen(found: list[Measured]) -> None:
    plan = choose(found, 2)
    rates = {one.layout: one.images_per_s for one in found}
    # Each step to a larger layout must be worth it, so what is left out lies within those steps.
    assert rates[plan.shared] * WORTH ** len(found) >= max(rates.values())
    alone = {one.layout: one.alone_ms or 0 for one in found}
    serving = min(
        alone[layout]
        for layout in alone
        if layout == plan.shared or (plan.lone and layout.threads == plan.lone.threads)
    )
    assert serving <= WORTH_ALONE * min(alone.values())


def test_a_plan_is_measured_on_the_model_itself(make_graph: Callable[..., Path]) -> None:
    plan = make_plan(Source("colour", make_graph()), 2, Wishes(max_batch=4))
    tried = {(one.layout, one.batch) for one in plan.measured}
    assert tried == {(layout, batch) for layout in (WIDE, NARROW) for batch in (1, 4)}
    assert all(one.images_per_s > 0 for one in plan.measured)
    assert (plan.shared, plan.batch) in tried


@pytest.mark.parametrize(
    ("wishes", "layout", "batch"),
    [
        (Wishes(sessions=3, max_batch=1), Layout(sessions=3, threads=1), 1),
        (Wishes(sessions=1, threads=5, max_batch=1), Layout(sessions=1, threads=5), 1),
        (Wishes(threads=2, max_batch=1), Layout(sessions=2, threads=2), 1),
    ],
)
def test_what_is_wished_for_is_not_measured(
    make_graph: Callable[..., Path], wishes: Wishes, layout: Layout, batch: int
) -> None:
    plan = make_plan(Source("colour", make_graph()), 4, wishes)
    assert (plan.shared, plan.lone, plan.batch, plan.measured) == (layout, None, batch, ())


def test_a_graph_of_fixed_batch_is_never_batched(make_graph: Callable[..., Path]) -> None:
    plan = make_plan(Source("colour", make_graph(size=(2, 40, 48))), 2, Wishes(sessions=1))
    assert (plan.batch, plan.measured) == (1, ())
