"""Networks that take multiples of a size, or one size: what the spec says and the graph does."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from srdeploy.deployable import Deployable, cut_logits, pad_images
from srdeploy.imaging import fitted_size
from srdeploy.outputs import resize_logits
from srdeploy.spec import InputPolicy, Spec

pytestmark = pytest.mark.wheel

SIDE = st.integers(32, 160)


def spec_with(policy: InputPolicy) -> Spec:
    return Spec(classes=("sky", "road"), palette=((0, 0, 0), (9, 9, 9)), input=policy)


class Halves(nn.Module):
    """Logits at half size, of images whose sides 16 divides; others it refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 2, 2, 2)

    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[2] % 16 == images.shape[3] % 16 == 0
        logits: Tensor = self.head(images)
        return logits


def test_a_spec_without_a_multiple_reads_and_writes_as_before_there_was_one() -> None:
    policy = InputPolicy()
    text = spec_with(policy).to_json()
    assert "multiple" not in text
    assert Spec.model_validate_json(text) == spec_with(policy)
    assert json.loads(spec_with(InputPolicy(multiple=32)).to_json())["input"]["multiple"] == 32
    assert "multiple" not in policy.model_dump_json()


@settings(max_examples=30, deadline=None)
@given(size=st.tuples(SIDE, SIDE), multiple=st.integers(1, 40))
def test_padding_adds_the_mean_colour_below_and_right_and_cutting_undoes_it(
    size: tuple[int, int], multiple: int
) -> None:
    images = torch.rand(1, 3, *size)
    padded = pad_images(images, multiple)
    policy = InputPolicy(multiple=multiple)
    assert padded.shape[2:] == policy.padded(size)
    assert all(
        0 <= more - side < multiple for more, side in zip(padded.shape[2:], size, strict=True)
    )
    assert torch.equal(padded[:, :, : size[0], : size[1]], images)
    assert float(padded.sum()) == pytest.approx(float(images.sum()), rel=1e-5)
    assert torch.equal(cut_logits(padded, size, multiple), images)


@settings(max_examples=20, deadline=None)
@given(size=st.tuples(SIDE, SIDE))
def test_the_deployed_labels_are_those_of_the_padded_image(size: tuple[int, int]) -> None:
    network = Halves()
    spec = spec_with(InputPolicy(multiple=16))
    image = torch.randint(0, 256, (1, *size, 3), dtype=torch.uint8)
    logits = Deployable(network, spec, output="logits")(image)
    assert logits.shape == (1, 2, *size)
    height, width = spec.input.padded(size)
    canvas = torch.zeros(1, 3, height, width)
    canvas[:, :, : size[0], : size[1]] = Deployable(network, spec).normalise(image)
    whole = resize_logits(network(canvas), (height, width))
    torch.testing.assert_close(logits, whole[:, :, : size[0], : size[1]])


@settings(max_examples=50, deadline=None)
@given(
    smallest=st.integers(1, 64),
    more=st.integers(0, 64),
    wanted=st.tuples(st.integers(1, 256), st.integers(1, 256)),
    multiple=st.integers(1, 40),
)
def test_a_probe_size_is_one_that_the_network_takes(
    smallest: int, more: int, wanted: tuple[int, int], multiple: int
) -> None:
    least, largest = (smallest, smallest), (smallest + more, smallest + more)
    policy = InputPolicy(smallest=least, usual=least, largest=largest, multiple=multiple)
    found = policy.near(wanted)
    assert policy.near(found) == found or any(a > b for a, b in zip(found, largest, strict=True))
    for axis in (0, 1):
        assert found[axis] % multiple == 0
        assert smallest <= found[axis] < largest[axis] + multiple
        if smallest <= wanted[axis] <= largest[axis]:
            assert 0 <= found[axis] - wanted[axis] < multiple


def test_a_network_of_one_size_sees_every_photo_at_that_size() -> None:
    size = (64, 96)
    policy = InputPolicy(smallest=size, usual=size, largest=size)
    assert policy.fixed
    assert fitted_size(500, 333, spec_with(policy)) == size
    assert not InputPolicy().fixed
