"""What an exit sees: maps are bright where something was planted, labels are the deployed ones."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor, nn

from srdeploy.deployable import Deployable
from srdeploy.spec import InputPolicy, Spec
from srdeploy.train.pictures import ExitView, contrast, predict_exits, view_exits
from srdeploy.train.regulation import SelfRegulation
from srdeploy.train.regulation_config import RegulationConfig

pytestmark = pytest.mark.wheel


class Shrink(nn.Module):
    """The image's channels, averaged over squares of 4 x 4; takes multiples of 4 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[2] % 4 or images.shape[3] % 4:
            raise ValueError("multiples of 4 are needed")
        squares = images.unflatten(2, (-1, 4)).unflatten(4, (-1, 4))
        averaged: Tensor = squares.mean((3, 5)) * self.scale[:, None, None]
        return averaged


class Colours(nn.Module):
    """Logits at a quarter of the size: the image's own channels, as classes red, green, blue."""

    stages = ("shrink",)
    auxiliary_heads: dict[str, float]

    def __init__(self, own: bool = False) -> None:
        super().__init__()
        self.shrink = Shrink()
        self.coarse = nn.Conv2d(3, 3, 1)
        self.auxiliary_heads = {"coarse": 0.4} if own else {}

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.shrink(images)
        coarse: Tensor = self.coarse(features)
        return features + 0 * coarse


def make_spec(multiple: int = 1) -> Spec:
    return Spec(
        classes=("red", "green", "blue"),
        palette=((255, 0, 0), (0, 255, 0), (0, 0, 255)),
        input=InputPolicy(multiple=multiple),
    )


def regulate(network: nn.Module, **options: Any) -> SelfRegulation:
    torch.manual_seed(0)
    return SelfRegulation(network, 3, settings=RegulationConfig(width=4, **options)).eval()


def gray_photo_with_a_red_square(height: int, width: int) -> np.ndarray:
    photo = np.full((height, width, 3), 90, np.uint8)
    photo[16:24, 40:48] = (250, 20, 20)
    return photo


def test_a_map_is_bright_where_a_feature_was_planted_and_dark_elsewhere() -> None:
    features = torch.full((5, 12, 16), 3.0)
    features[2, 4:6, 9:11] = 7.0
    expected = np.zeros((12, 16), np.float32)
    expected[4:6, 9:11] = 1.0
    np.testing.assert_array_equal(contrast(features), expected)


def test_a_map_of_equal_cells_is_dark() -> None:
    torch.manual_seed(0)
    features = torch.randn(64, 1, 1).expand(64, 7, 9) * 1e3
    np.testing.assert_array_equal(contrast(features), np.zeros((7, 9), np.float32))


@settings(deadline=None, max_examples=40)
@given(
    values=arrays.arrays(
        np.float32, (3, 4, 5), elements=st.floats(-8, 8, width=16, allow_subnormal=False)
    ),
    shift=arrays.arrays(np.float32, (3, 1, 1), elements=st.integers(-8, 8)),
    factor=st.sampled_from([0.25, 1.0, 8.0]),
)
def test_a_map_tells_neither_a_constant_part_nor_the_size_of_features(
    values: np.ndarray, shift: np.ndarray, factor: float
) -> None:
    features = torch.from_numpy(np.round(values * 16) / 16)
    heat = contrast(features)
    assert heat.shape == (4, 5)
    assert heat.min() >= 0
    assert heat.max() <= 1
    moved = contrast(features * factor + torch.from_numpy(shift))
    spread = float(features.amax() - features.amin())
    if spread > 0:
        np.testing.assert_allclose(moved, heat, atol=1e-3)


@pytest.mark.parametrize("multiple", [4, 32], ids=["fits", "padded"])
def test_a_tap_is_bright_on_the_photo_s_object(multiple: int) -> None:
    spec = make_spec(multiple)
    photo = gray_photo_with_a_red_square(48, 72)
    tap = view_exits(regulate(Colours()), photo, spec)[0]
    height, width = tap.covered
    assert (height, width) == ((48, 72) if multiple == 4 else (64, 96))
    assert tap.grid == (height // 4, width // 4)
    inside = np.zeros((12, 18), bool)
    inside[4:6, 10:12] = True
    heat = tap.heat[:12, :18]
    assert heat[inside].min() > 0.9
    assert heat[~inside].max() < 0.2


@pytest.mark.parametrize("size", [(48, 72), (45, 70)], ids=["fits", "padded"])
def test_the_output_s_labels_are_those_of_the_deployed_graph(size: tuple[int, int]) -> None:
    spec = make_spec(8)
    photo = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    network = Colours().eval()
    output = view_exits(regulate(network), photo, spec)[-1]
    with torch.no_grad():
        deployed = Deployable(network, spec)(torch.from_numpy(photo)[None])[0].numpy()
    assert output.labels is not None
    np.testing.assert_array_equal(output.labels, deployed)
    assert output.agreement == 1.0


def test_views_are_those_of_taps_then_own_heads_then_the_output() -> None:
    regulated = regulate(Colours(own=True))
    photo = gray_photo_with_a_red_square(48, 72)
    views = view_exits(regulated, photo, make_spec())
    assert [(view.name, view.role) for view in views] == [
        ("shrink", "tap"),
        ("coarse", "own"),
        ("output", "output"),
    ]
    tap, own, output = views
    assert (tap.channels, tap.stride, tap.grid) == (3, 4, (12, 18))
    assert (own.stride, output.stride) == (None, None)
    masks = predict_exits(regulated, photo, make_spec())
    np.testing.assert_array_equal(tap.labels, masks[0])
    np.testing.assert_array_equal(output.labels, masks[1])
    assert tap.agreement == np.mean(masks[0] == masks[1])


def test_the_output_s_map_is_the_winner_s_probability() -> None:
    photo = gray_photo_with_a_red_square(48, 72)
    regulated = regulate(Colours())
    output = view_exits(regulated, photo, make_spec())[-1]
    assert output.heat.shape == (12, 18)
    assert output.heat.min() >= 1 / 3
    assert output.heat.max() <= 1
    assert output.heat[4:6, 10:12].min() > output.heat[0, 0]


@pytest.mark.parametrize(
    ("trained", "options", "segmented", "classified"),
    [
        (True, {}, True, True),
        (False, {}, False, False),
        (True, {"cls_weight": 0, "srl_weight": 0}, True, False),
        (True, {"seg_weight": 0, "srf_weight": 0}, False, True),
    ],
    ids=["regulated", "baseline", "no classifiers", "no segmenters"],
)
def test_what_was_not_trained_says_nothing(
    trained: bool, options: dict[str, Any], segmented: bool, classified: bool
) -> None:
    photo = gray_photo_with_a_red_square(48, 72)
    views = view_exits(regulate(Colours(), **options), photo, make_spec(), trained)
    assert said(views[0]) == (segmented, segmented, classified)
    assert said(views[-1]) == (True, True, classified)


def said(view: ExitView) -> tuple[bool, bool, bool]:
    return view.labels is not None, view.agreement is not None, view.presence is not None


def test_presence_is_a_probability_per_class() -> None:
    views = view_exits(regulate(Colours()), gray_photo_with_a_red_square(48, 72), make_spec())
    for view in views:
        assert view.presence is not None
        assert len(view.presence) == 3
        assert all(0 < share < 1 for share in view.presence)


def test_no_hook_stays_behind() -> None:
    regulated = regulate(Colours())
    view_exits(regulated, gray_photo_with_a_red_square(48, 72), make_spec())
    for module in regulated.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
