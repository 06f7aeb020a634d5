"""Which layout of sessions is chosen, and that it is one that was measured."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srdeploy.serve.scheduling import planner
from srdeploy.serve.scheduling.planner import (
    MIN_LATENCY_SPEEDUP,
    MIN_SPEEDUP,
    LayoutTrial,
    ModelSource,
    PlanConstraints,
    SessionLayout,
    choose_plan,
    make_plan,
)

WIDE = SessionLayout(sessions=1, threads=2)
NARROW = SessionLayout(sessions=2, threads=1)


@pytest.fixture(autouse=True)
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "TRIAL_S", 0.005)


def measured(
    layout: SessionLayout, batch: int, rate: float, latency: float | None = None
) -> LayoutTrial:
    return LayoutTrial(layout=layout, batch=batch, images_per_s=rate, latency_ms=latency)


def test_concurrent_requests_and_a_single_one_each_get_the_fastest_layout() -> None:
    plan = choose_plan([measured(WIDE, 1, 45, 22), measured(NARROW, 1, 50, 40)], 2)
    assert (plan.shared, plan.latency, plan.batch) == (NARROW, WIDE, 1)
    assert str(plan) == "2 sessions of 1 thread; 1 session of 2 threads for low latency"


def test_there_is_no_latency_session_where_it_gains_little() -> None:
    plan = choose_plan([measured(WIDE, 1, 45, 38), measured(NARROW, 1, 50, 40)], 2)
    assert (plan.shared, plan.latency) == (NARROW, None)


def test_cores_are_left_for_decoding_where_layouts_are_as_fast() -> None:
    assert choose_plan([measured(WIDE, 1, 50, 22), measured(NARROW, 1, 50, 40)], 2).shared == NARROW
    one, two = (SessionLayout(sessions=count) for count in (1, 2))
    assert choose_plan([measured(one, 1, 50, 22), measured(two, 1, 50, 22)], 2).shared == one


def test_batches_are_used_where_they_pay_and_only_there() -> None:
    small = measured(WIDE, 1, 100, 10)
    assert choose_plan([small, measured(WIDE, 8, 300)], 2).batch == 8
    assert choose_plan([small, measured(WIDE, 8, 90)], 2).batch == 1
    assert choose_plan([small, measured(WIDE, 8, 101)], 2).batch == 1


figures = st.builds(
    measured,
    st.builds(SessionLayout, sessions=st.integers(1, 4), threads=st.integers(1, 4)),
    st.just(1),
    st.floats(1, 1000),
    st.floats(1, 1000),
)


@given(st.lists(figures, min_size=1, max_size=6, unique_by=lambda one: one.layout))
def test_nothing_measured_is_much_better_than_what_is_chosen(found: list[LayoutTrial]) -> None:
    plan = choose_plan(found, 2)
    rates = {one.layout: one.images_per_s for one in found}
    # Each step to a larger layout must be worth it, so what is left out lies within those steps.
    assert rates[plan.shared] * MIN_SPEEDUP ** len(found) >= max(rates.values())
    latencies = {one.layout: one.latency_ms or 0 for one in found}
    serving = min(
        latencies[layout]
        for layout in latencies
        if layout == plan.shared or (plan.latency and layout.threads == plan.latency.threads)
    )
    assert serving <= MIN_LATENCY_SPEEDUP * min(latencies.values())


def test_a_plan_is_measured_on_the_model_itself(make_graph: Callable[..., Path]) -> None:
    plan = make_plan(ModelSource("colour", make_graph()), 2, PlanConstraints(max_batch=4))
    tried = {(one.layout, one.batch) for one in plan.measured}
    assert tried == {(layout, batch) for layout in (WIDE, NARROW) for batch in (1, 4)}
    assert all(one.images_per_s > 0 for one in plan.measured)
    assert (plan.shared, plan.batch) in tried


@pytest.mark.parametrize(
    ("constraints", "layout", "batch"),
    [
        (PlanConstraints(sessions=3, max_batch=1), SessionLayout(sessions=3, threads=1), 1),
        (
            PlanConstraints(sessions=1, threads=5, max_batch=1),
            SessionLayout(sessions=1, threads=5),
            1,
        ),
        (PlanConstraints(threads=2, max_batch=1), SessionLayout(sessions=2, threads=2), 1),
    ],
)
def test_what_the_constraints_fix_is_not_measured(
    make_graph: Callable[..., Path], constraints: PlanConstraints, layout: SessionLayout, batch: int
) -> None:
    plan = make_plan(ModelSource("colour", make_graph()), 4, constraints)
    assert (plan.shared, plan.latency, plan.batch, plan.measured) == (layout, None, batch, ())


def test_a_graph_of_fixed_batch_is_never_batched(make_graph: Callable[..., Path]) -> None:
    plan = make_plan(
        ModelSource("colour", make_graph(size=(2, 40, 48))), 2, PlanConstraints(sessions=1)
    )
    assert (plan.batch, plan.measured) == (1, ())
