"""Losses weighted by confidence: against plain loops in float64, and in the metamorphic cases."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from srdeploy import SelfRegulation
from srdeploy.errors import UserError
from srdeploy.train import losses
from srdeploy.train.regulation_config import RegulationConfig

IGNORE = 255
K = 4

shapes = st.tuples(st.integers(1, 3), st.sampled_from([2, 5]), st.integers(1, 9), st.integers(1, 9))
seeds = st.integers(0, 2**31)
few = settings(max_examples=25, deadline=None)


def made(shape: tuple[int, int, int, int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits float32 [N, K, H, W], labels uint8 [N, H, W] of which a fifth is ignored, and their
    confidence uint8 [N, H, W], a fifth of it 0 and a fifth of it 255."""
    generator = torch.Generator().manual_seed(seed)
    batch, classes, height, width = shape
    logits = 4 * torch.randn(shape, generator=generator)
    labels = torch.randint(classes, (batch, height, width), generator=generator)
    holes = torch.rand(labels.shape, generator=generator) < 0.2
    drawn = torch.randint(-64, 320, labels.shape, generator=generator).clamp(0, 255)
    return logits, torch.where(holes, IGNORE, labels).to(torch.uint8), drawn.to(torch.uint8)


def log_softmax(logits: Tensor, axis: int = 1) -> np.ndarray:
    values = logits.numpy().astype(np.float64)
    values = values - values.max(axis, keepdims=True)
    return np.asarray(values - np.log(np.exp(values).sum(axis, keepdims=True)))


@few
@given(shapes, seeds, st.booleans())
def test_cross_entropy_is_the_mean_weighted_by_confidence_and_class(
    shape: tuple[int, int, int, int], seed: int, weighted: bool
) -> None:
    logits, labels, sure = made(shape, seed)
    weights = torch.linspace(0.01, 2, shape[1]) if weighted else None
    table = log_softmax(logits)
    top = bottom = 0.0
    for n, y, x in np.argwhere(labels.numpy() != IGNORE):
        label = int(labels[n, y, x])
        weight = int(sure[n, y, x]) / 255 * (1.0 if weights is None else float(weights[label]))
        top -= weight * table[n, label, y, x]
        bottom += weight
    found = losses.pixel_cross_entropy(logits, labels, IGNORE, weights, sure)
    expected = top / bottom if bottom else 0.0
    assert found.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@few
@given(shapes, seeds, st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_cross_entropy_of_cells_is_the_full_size_loss_of_blockwise_logits(
    shape: tuple[int, int, int, int], seed: int, height: int, width: int, weighted: bool
) -> None:
    _, labels, sure = made(shape, seed)
    batch, classes, *_ = shape
    logits, *_ = made((batch, classes, height, width), seed + 1)
    weights = torch.linspace(0.1, 2, classes) if weighted else None
    counts = losses.count_labels(labels, classes, (height, width), IGNORE, sure)
    enlarged = functional.interpolate(logits, size=labels.shape[1:], mode="nearest-exact")
    expected = losses.pixel_cross_entropy(enlarged, labels, IGNORE, weights, sure)
    found = losses.count_cross_entropy(logits, counts, weights)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@few
@given(shapes, seeds)
def test_cells_count_each_class_by_whole_numbers_of_255ths(
    shape: tuple[int, int, int, int], seed: int
) -> None:
    _, labels, sure = made(shape, seed)
    counts = losses.count_labels(labels, shape[1], (1, 1), IGNORE, sure)
    for n in range(shape[0]):
        for label in range(shape[1]):
            whole = int(sure[n][labels[n] == label].long().sum())
            assert counts[n, label, 0, 0] == torch.tensor(float(whole)) / 255


@few
@given(shapes, seeds, st.sampled_from([1.0, 2.0]))
def test_pixels_of_feedback_weigh_as_their_confidence_says(
    shape: tuple[int, int, int, int], seed: int, temperature: float
) -> None:
    student, labels, sure = made(shape, seed)
    teacher, *_ = made(shape, seed + 1)
    valid = labels != IGNORE
    trusted = teacher.argmax(1) == labels
    p, q = log_softmax(teacher / temperature), log_softmax(student / temperature)
    plain = log_softmax(student)
    soft = hard = bottom = 0.0
    for n, y, x in np.argwhere(valid.numpy()):
        weight = int(sure[n, y, x]) / 255
        bottom += weight
        if trusted[n, y, x]:
            terms = np.exp(p[n, :, y, x]) * (p[n, :, y, x] - q[n, :, y, x])
            soft += weight * temperature**2 * float(terms.sum())
            hard -= weight * plain[n, int(labels[n, y, x]), y, x]
    for expected, found in (
        (soft, losses.soft_feedback(student, teacher, valid, temperature, trusted, sure)),
        (hard, losses.hard_feedback(student, teacher, valid, trusted, sure)),
    ):
        assert found.item() == pytest.approx(expected / (bottom or 1), rel=1e-4, abs=1e-5)


@few
@given(shapes, seeds)
def test_where_channels_look_is_weighted_by_confidence(
    shape: tuple[int, int, int, int], seed: int
) -> None:
    student, labels, sure = made(shape, seed)
    teacher, *_ = made(shape, seed + 1)
    valid = labels != IGNORE
    images = []
    for n in range(shape[0]):
        here = (valid[n] & (sure[n] > 0)).numpy()
        if not here.any():
            continue
        weight = sure[n].numpy()[here] / 255
        p, q = (np.exp(one[n].numpy().astype(np.float64)[:, here]) for one in (teacher, student))
        p, q = (one * weight / (one * weight).sum(1, keepdims=True) for one in (p, q))
        images.append((p * np.log(p / q)).sum(1).mean())
    expected = float(np.mean(images or [0.0]))
    found = losses.feature_feedback(student, teacher, valid, 1.0, sure)
    assert found.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def each_loss(logits: Tensor, labels: Tensor, sure: Tensor | None) -> dict[str, Tensor]:
    """Every loss that takes a confidence, on leaves of its own."""
    weights = torch.linspace(0.1, 2, logits.shape[1])
    teacher = logits.detach().roll(1, 2)
    valid = labels != IGNORE
    counts = losses.count_labels(labels, logits.shape[1], (2, 3), IGNORE, sure)
    small = functional.interpolate(logits, size=(2, 3))
    return {
        "pixel": losses.pixel_cross_entropy(logits, labels, IGNORE, None, sure),
        "class": losses.pixel_cross_entropy(logits, labels, IGNORE, weights, sure),
        "count": losses.count_cross_entropy(small, counts),
        "count of classes": losses.count_cross_entropy(small, counts, weights),
        "hard": losses.hard_feedback(logits, teacher, valid, None, sure),
        "soft": losses.soft_feedback(logits, teacher, valid, 2.0, None, sure),
        "feature": losses.feature_feedback(logits, teacher, valid, 2.0, sure),
    }


def gradients(logits: Tensor, labels: Tensor, sure: Tensor | None) -> dict[str, Tensor]:
    leaf = logits.clone().requires_grad_()
    found = each_loss(leaf, labels, sure)
    return {
        name: torch.autograd.grad(loss, leaf, retain_graph=True)[0] for name, loss in found.items()
    }


@few
@given(shapes, seeds)
def test_certain_everywhere_is_no_confidence_bit_for_bit(
    shape: tuple[int, int, int, int], seed: int
) -> None:
    logits, labels, _ = made(shape, seed)
    certain = torch.full_like(labels, 255)
    for compare in (each_loss, gradients):
        with_it, without = compare(logits, labels, certain), compare(logits, labels, None)
        for name, value in without.items():
            assert torch.equal(with_it[name], value), name


@few
@given(shapes, seeds)
def test_a_pixel_of_no_confidence_is_an_ignored_one(
    shape: tuple[int, int, int, int], seed: int
) -> None:
    logits, labels, sure = made(shape, seed)
    holes = torch.where(sure == 0, IGNORE, labels)
    for compare in (each_loss, gradients):
        ours, theirs = compare(logits, labels, sure), compare(logits, holes, sure)
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), name


def test_without_any_confidence_losses_and_gradients_are_zero() -> None:
    logits, labels, _ = made((2, 5, 6, 7), 0)
    nothing = torch.zeros_like(labels)
    for compare in (each_loss, gradients):
        for name, value in compare(logits, labels, nothing).items():
            assert not value.any(), name


def test_more_pixels_than_float32_counts_are_counted_still() -> None:
    # 255 * 2**17 is more than 2**24: the sum of the confidences is exact all the same.
    labels = torch.zeros(2**5, 2**6, 2**6, dtype=torch.uint8)
    labels[0, 0, 0] = IGNORE
    logits = torch.zeros(2**5, 2, 2**6, 2**6)
    logits[0, 0, 0, 1] = 3
    certain = torch.full_like(labels, 255)
    assert torch.equal(
        losses.pixel_cross_entropy(logits, labels, IGNORE, None, certain),
        losses.pixel_cross_entropy(logits, labels, IGNORE),
    )


class Staged(nn.Module):
    """Two stages, a head and a second supervised head."""

    stages = ("one", "two")

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary_heads = {"coarse": 0.4}
        self.one = nn.Sequential(nn.Conv2d(3, 4, 3, 4, 1), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU())
        self.coarse = nn.Conv2d(4, K, 1)
        self.head = nn.Conv2d(6, K, 1)

    def forward(self, images: Tensor) -> Tensor:
        one = self.one(images)
        self.coarse(one)
        found: Tensor = functional.interpolate(self.head(self.two(one)), images.shape[2:])
        return found


FORMS = {
    "off": RegulationConfig(enabled=False),
    "lean": RegulationConfig(),
    "everywhere": RegulationConfig(srf_where="everywhere"),
    "proportion": RegulationConfig(labels="proportion"),
    "feature": RegulationConfig(srf_form="feature", labels="proportion"),
    "authors": RegulationConfig.authors(),
}


def regulated_by(name: str, **changes: Any) -> tuple[SelfRegulation, Tensor, Tensor, Tensor]:
    """With images [2, 3, 40, 56], labels and their confidence, of which every cell has some."""
    torch.manual_seed(0)
    regulated = SelfRegulation(Staged(), K, settings=FORMS[name], **changes).eval()
    _, labels, sure = made((2, K, 40, 56), 3)
    return regulated, torch.randn(2, 3, 40, 56), labels, sure


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 1.0, 3.0, 0.2])])
def test_certain_labels_train_as_labels_without_confidence(
    name: str, weights: Tensor | None
) -> None:
    found = []
    for certain in (False, True):
        regulated, images, labels, _ = regulated_by(name, class_weights=weights)
        sure = torch.full_like(labels, 255) if certain else None
        loss = regulated.losses(images, labels, 1.0, sure)
        torch.autograd.backward(loss.total)
        gradients = {n: p.grad for n, p in regulated.named_parameters() if p.grad is not None}
        found.append({**loss.terms, **gradients})
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        assert torch.equal(found[1][key], value), key


@pytest.mark.parametrize("name", FORMS)
def test_labels_of_no_confidence_are_ignored_in_every_term(name: str) -> None:
    regulated, images, labels, sure = regulated_by(name)
    # One class is nowhere sure, and of the second image nothing is.
    halves = torch.where((sure < 128) | (labels == 3), 0, 255).to(torch.uint8)
    halves[1] = 0
    outputs = regulated(images)
    ours = regulated.losses_of(outputs, labels, 1.0, halves)
    theirs = regulated.losses_of(outputs, torch.where(halves == 0, IGNORE, labels))
    assert ours.terms.keys() == theirs.terms.keys()
    for term, value in theirs.terms.items():
        torch.testing.assert_close(ours.terms[term], value, msg=term)


@pytest.mark.parametrize("name", FORMS)
def test_confidence_weighs_pixels_and_not_what_an_image_shows(name: str) -> None:
    regulated, images, labels, sure = regulated_by(name)
    sure = sure.clamp(min=1)
    outputs = regulated(images)
    plain = regulated.losses_of(outputs, labels).terms
    found = regulated.losses_of(outputs, labels, 1.0, sure).terms
    assert found.keys() == plain.keys()
    for term, value in plain.items():
        assert torch.equal(found[term], value) is (term in ("cls", "srl")), term
    full = functional.interpolate(outputs.own["coarse"], labels.shape[1:], mode="bilinear")
    values = functional.cross_entropy(full, labels.long(), ignore_index=255, reduction="none")
    weights = torch.where(labels == IGNORE, 0, sure).double()
    mean = ((values.double() * weights).sum() / weights.sum()).float()
    torch.testing.assert_close(found["own"], 0.4 * mean.detach())
    if "seg" in found:
        sizes = [tuple(one.shape[2:]) for one in outputs.logits[:-1]]
        expected = []
        for one, size in zip(outputs.logits, sizes, strict=False):
            if regulated.settings.labels == "nearest":
                target = [losses.shrink_labels(each, size) for each in (labels, sure)]
            else:
                one = functional.interpolate(one, labels.shape[1:], mode="nearest-exact")
                target = [labels, sure]
            expected.append(losses.pixel_cross_entropy(one, target[0], IGNORE, None, target[1]))
        torch.testing.assert_close(found["seg"], torch.stack(expected).sum().detach())


def test_a_confidence_that_does_not_fit_is_refused() -> None:
    regulated, images, labels, sure = regulated_by("lean")
    for wrong, said in (
        (sure[:1], r"torch\.uint8 of shape \(1, 40, 56\)"),
        (sure / 255, r"torch\.float32 of shape \(2, 40, 56\)"),
    ):
        with pytest.raises(UserError, match=f"confidence is {said}: it must be torch.uint8"):
            regulated.losses(images, labels, 1.0, wrong)
