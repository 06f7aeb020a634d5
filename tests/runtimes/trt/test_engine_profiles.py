"""Which optimisation profile runs which images, and in how many parts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srdeploy.artifacts.artifact import Profile
from srdeploy.runtimes.base import ImageShapeError
from srdeploy.runtimes.trt.engine import choose_profile, plan_chunks
from tests.runtimes.trt.fake_machine import PROFILE, Bench, MakeEngine, photos


@pytest.mark.parametrize("shape", [(1, 65, 40), (1, 40, 65), (9, 65, 40)])
def test_a_shape_without_a_profile_is_refused_with_the_ranges(
    bench: Bench, make_engine: MakeEngine, shape: tuple[int, int, int]
) -> None:
    tall = Profile(smallest=(2, 80, 32), usual=(2, 80, 32), largest=(2, 80, 64))
    with bench.runtime(make_engine(profiles=(PROFILE, tall))) as runtime:
        with pytest.raises(
            ImageShapeError,
            match=r"N 1 to 4, H 32 to 64, W 32 to 64; N 2, H 80, W 32 to 64.*profile that covers",
        ) as caught:
            runtime.run(photos(*shape))
        assert str([*shape, 3]) in str(caught.value)
        assert runtime.run(photos(1)).shape == (1, 40, 48)


sizes = st.integers(1, 6)
ranges = st.tuples(sizes, sizes, sizes).map(sorted)
profile_lists = st.lists(
    st.tuples(ranges, ranges, ranges).map(
        lambda axes: Profile(
            smallest=(axes[0][0], axes[1][0], axes[2][0]),
            usual=(axes[0][1], axes[1][1], axes[2][1]),
            largest=(axes[0][2], axes[1][2], axes[2][2]),
        )
    ),
    min_size=1,
    max_size=3,
)


@given(profiles=profile_lists, shape=st.tuples(st.integers(1, 14), sizes, sizes))
def test_chunks_cover_the_batch_in_as_few_parts_as_can_be(
    profiles: list[Profile], shape: tuple[int, int, int]
) -> None:
    n, height, width = shape

    def taken(count: int) -> bool:
        return any(
            one.smallest[0] <= count <= one.largest[0]
            and one.smallest[1] <= height <= one.largest[1]
            and one.smallest[2] <= width <= one.largest[2]
            for one in profiles
        )

    splits = ([len(part) for part in np.array_split(range(n), k)] for k in range(1, n + 1))
    expected = next((split for split in splits if all(map(taken, split))), None)
    if expected is None:
        with pytest.raises(ImageShapeError):
            plan_chunks(profiles, shape)
        return
    chunks = plan_chunks(profiles, shape)
    assert [chunk.count for chunk in chunks] == expected
    assert [chunk.start for chunk in chunks] == list(np.cumsum([0, *expected[:-1]]))
    for chunk in chunks:
        assert chunk.profile == choose_profile(profiles, (chunk.count, height, width))
