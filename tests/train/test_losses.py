"""Loss values against plain numpy in float64, written out from the formulas."""

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from math import floor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from srdeploy.train import losses
from srdeploy.train.regulation_config import ramp

IGNORE = 255
Floats = NDArray[np.float64]

shapes = st.tuples(
    st.integers(1, 3), st.sampled_from([2, 5, 150]), st.integers(1, 9), st.integers(1, 9)
)
seeds = st.integers(0, 2**31)
ignored_shares = st.sampled_from([0.0, 0.3, 0.9, 1.0])
few = settings(max_examples=25, deadline=None)


def made(shape: tuple[int, int, int, int], seed: int, ignored: float) -> tuple[Tensor, Tensor]:
    """Logits float32 [N, K, H, W] and labels uint8 [N, H, W], a share of which is ignored."""
    generator = torch.Generator().manual_seed(seed)
    batch, classes, height, width = shape
    logits = 4 * torch.randn(shape, generator=generator)
    labels = torch.randint(classes, (batch, height, width), generator=generator)
    holes = torch.rand(labels.shape, generator=generator) < ignored
    return logits, torch.where(holes, IGNORE, labels).to(torch.uint8)


def log_softmax(logits: Tensor, axis: int = 1) -> Floats:
    values = logits.detach().numpy().astype(np.float64)
    values = values - values.max(axis, keepdims=True)
    return np.asarray(values - np.log(np.exp(values).sum(axis, keepdims=True)))


def sigmoid(logits: Tensor) -> Floats:
    return np.asarray(1 / (1 + np.exp(-logits.detach().numpy().astype(np.float64))))


def numpy_bce(logits: Tensor, targets: Floats, rows: NDArray[np.bool_]) -> float:
    found = sigmoid(logits)[rows]
    values = -(targets[rows] * np.log(found) + (1 - targets[rows]) * np.log(1 - found))
    return float(values.mean()) if rows.any() else 0.0


@few
@given(shapes, seeds, ignored_shares, st.booleans())
def test_pixel_cross_entropy_is_the_weighted_mean_over_valid_pixels(
    shape: tuple[int, int, int, int], seed: int, ignored: float, weighted: bool
) -> None:
    logits, labels = made(shape, seed, ignored)
    weights = torch.linspace(0.01, 2, shape[1]) if weighted else None
    table = log_softmax(logits)
    top = bottom = 0.0
    for n, y, x in np.argwhere(labels.numpy() != IGNORE):
        label = int(labels[n, y, x])
        weight = 1.0 if weights is None else float(weights[label])
        top -= weight * table[n, label, y, x]
        bottom += weight
    expected = top / bottom if bottom else 0.0
    found = losses.pixel_cross_entropy(logits, labels, IGNORE, weights)
    assert found.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_pixel_cross_entropy_without_ignored_pixels_is_torchs_own() -> None:
    logits, labels = made((2, 5, 7, 6), 0, 0.0)
    weights = torch.rand(5) + 0.1
    expected = functional.cross_entropy(logits, labels.long(), weight=weights)
    found = losses.pixel_cross_entropy(logits, labels, IGNORE, weights)
    torch.testing.assert_close(found, expected)


@few
@given(st.integers(1, 90), st.integers(1, 90))
def test_shrunk_labels_are_the_pixels_under_the_cells_centres(height: int, size: int) -> None:
    labels = torch.arange(height)[None, :, None].expand(1, height, 2)
    expected = [floor((Fraction(i) + Fraction(1, 2)) * height / size) for i in range(size)]
    assert losses.shrink_labels(labels, (size, 1))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("size", [(41, 41), (21, 31), (321, 1)])
def test_shrunk_labels_equal_torchs_nearest_exact(size: tuple[int, int]) -> None:
    labels = torch.randint(0, 255, (2, 321, 321), dtype=torch.uint8)
    expected = functional.interpolate(labels[:, None].float(), size=size, mode="nearest-exact")
    assert torch.equal(losses.shrink_labels(labels, size), expected[:, 0].to(torch.uint8))


@few
@given(shapes, seeds, ignored_shares, st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_count_cross_entropy_is_the_full_size_loss_of_blockwise_logits(
    shape: tuple[int, int, int, int],
    seed: int,
    ignored: float,
    height: int,
    width: int,
    weighted: bool,
) -> None:
    _, labels = made(shape, seed, ignored)
    batch, classes, *_ = shape
    logits, _ = made((batch, classes, height, width), seed + 1, 0.0)
    weights = torch.linspace(0.1, 2, classes) if weighted else None
    counts = losses.count_labels(labels, classes, (height, width), IGNORE)
    enlarged = functional.interpolate(logits, size=labels.shape[1:], mode="nearest-exact")
    expected = losses.pixel_cross_entropy(enlarged, labels, IGNORE, weights)
    found = losses.count_cross_entropy(logits, counts, weights)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@few
@given(shapes, seeds, ignored_shares)
def test_every_valid_pixel_is_counted_once(
    shape: tuple[int, int, int, int], seed: int, ignored: float
) -> None:
    _, labels = made(shape, seed, ignored)
    counts = losses.count_labels(labels, shape[1], (3, 2), IGNORE)
    for n in range(shape[0]):
        values = labels[n][labels[n] != IGNORE].long()
        expected = torch.bincount(values, minlength=shape[1]).float()
        assert torch.equal(counts[n].sum((1, 2)), expected)


@few
@given(shapes, seeds, ignored_shares)
def test_presence_names_the_classes_of_valid_pixels_with_background(
    shape: tuple[int, int, int, int], seed: int, ignored: float
) -> None:
    _, labels = made(shape, seed, ignored)
    found = losses.presence(labels, shape[1], IGNORE)
    for n in range(shape[0]):
        expected = set(labels[n].flatten().tolist()) - {IGNORE}
        assert set(found[n].nonzero().flatten().tolist()) == expected
    assert set(found.flatten().tolist()) <= {0.0, 1.0}


def test_255_classes_fit_beside_the_ignore_index() -> None:
    labels = torch.tensor([[[254, 255]]], dtype=torch.uint8)
    assert losses.presence(labels, 255, 255)[0].nonzero().tolist() == [[254]]
    assert losses.count_labels(labels, 255, (1, 1), 255)[0, :, 0, 0].nonzero().tolist() == [[254]]


@few
@given(shapes, seeds, ignored_shares)
def test_classification_is_binary_cross_entropy_over_labelled_images(
    shape: tuple[int, int, int, int], seed: int, ignored: float
) -> None:
    logits, labels = made(shape, seed, ignored)
    class_logits = logits.mean((2, 3))
    shown = losses.presence(labels, shape[1], IGNORE)
    labelled = losses.labelled_images(labels, IGNORE)
    rows = (labels.numpy() != IGNORE).any((1, 2))
    expected = numpy_bce(class_logits, shown.numpy().astype(np.float64), rows)
    found = losses.classification(class_logits, shown, labelled)
    assert found.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@few
@given(shapes, seeds, ignored_shares)
def test_hard_feedback_is_cross_entropy_against_the_teachers_labels(
    shape: tuple[int, int, int, int], seed: int, ignored: float
) -> None:
    student, labels = made(shape, seed, ignored)
    teacher, _ = made(shape, seed + 1, 0.0)
    valid = labels != IGNORE
    table = log_softmax(student)
    chosen = teacher.numpy().argmax(1)
    terms = [-table[n, chosen[n, y, x], y, x] for n, y, x in np.argwhere(valid.numpy())]
    found = losses.hard_feedback(student, teacher, valid)
    assert found.item() == pytest.approx(float(np.mean(terms or [0.0])), rel=1e-5, abs=1e-6)


@few
@given(shapes, seeds, ignored_shares, st.sampled_from([0.5, 1.0, 4.0]))
def test_soft_feedback_is_the_tempered_divergence_summed_over_classes(
    shape: tuple[int, int, int, int], seed: int, ignored: float, temperature: float
) -> None:
    student, labels = made(shape, seed, ignored)
    teacher, _ = made(shape, seed + 1, 0.0)
    valid = labels != IGNORE
    p, q = log_softmax(teacher / temperature), log_softmax(student / temperature)
    divergence = (np.exp(p) * (p - q)).sum(1)[valid.numpy()]
    expected = temperature**2 * divergence.mean() if valid.any() else 0.0
    found = losses.soft_feedback(student, teacher, valid, temperature)
    assert found.item() == pytest.approx(float(expected), rel=1e-4, abs=1e-5)


@few
@given(shapes, seeds, ignored_shares)
def test_a_teacher_is_followed_where_it_is_trusted_in_the_mean_over_all_valid_pixels(
    shape: tuple[int, int, int, int], seed: int, ignored: float
) -> None:
    student, labels = made(shape, seed, ignored)
    teacher, _ = made(shape, seed + 1, 0.0)
    valid = labels != IGNORE
    trusted = teacher.argmax(1) == labels
    count = max(1, int(valid.sum()))
    p, q = log_softmax(teacher), log_softmax(student)
    divergence = (np.exp(p) * (p - q)).sum(1)[trusted.numpy()].sum() / count
    found = losses.soft_feedback(student, teacher, valid, 1.0, trusted)
    assert found.item() == pytest.approx(float(divergence), rel=1e-4, abs=1e-5)
    # The labels of a teacher that is right are ground truth's.
    right = [-q[n, int(labels[n, y, x]), y, x] for n, y, x in np.argwhere(trusted.numpy())]
    hard = losses.hard_feedback(student, teacher, valid, trusted)
    assert hard.item() == pytest.approx(float(sum(right)) / count, rel=1e-5, abs=1e-6)


@few
@given(shapes, seeds, ignored_shares, st.sampled_from([0.5, 1.0, 4.0]))
def test_feature_feedback_compares_where_channels_look_among_valid_positions(
    shape: tuple[int, int, int, int], seed: int, ignored: float, temperature: float
) -> None:
    student, labels = made(shape, seed, ignored)
    teacher, _ = made(shape, seed + 1, 0.0)
    valid = labels != IGNORE
    images = []
    for n in range(shape[0]):
        if valid[n].any():
            p = log_softmax(teacher[n][:, valid[n]] / temperature)
            q = log_softmax(student[n][:, valid[n]] / temperature)
            images.append((np.exp(p) * (p - q)).sum(1).mean())
    expected = temperature**2 * float(np.mean(images or [0.0]))
    found = losses.feature_feedback(student, teacher, valid, temperature)
    assert found.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@few
@given(shapes, seeds, st.sampled_from([0.5, 1.0, 4.0]))
def test_class_feedback_is_cross_entropy_against_the_deepest_probabilities(
    shape: tuple[int, int, int, int], seed: int, temperature: float
) -> None:
    student, teacher = (made(shape, seed + i, 0.0)[0].mean((2, 3)) for i in (0, 1))
    labelled = torch.arange(shape[0]) > 0  # the first image has no label
    rows = labelled.numpy()
    tempered = numpy_bce(student / temperature, sigmoid(teacher / temperature), rows)
    found = losses.class_feedback(student, teacher, labelled, temperature)
    assert found.item() == pytest.approx(temperature**2 * tempered, rel=1e-5, abs=1e-6)


def soft(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    return losses.soft_feedback(student, teacher, valid, 2.0)


def feature(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    return losses.feature_feedback(student, teacher, valid, 2.0)


def classes_of(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    labelled = valid.flatten(1).any(1)
    return losses.class_feedback(student.mean((2, 3)), teacher.mean((2, 3)), labelled, 2.0)


FEEDBACKS = pytest.mark.parametrize(
    "feedback", [losses.hard_feedback, soft, feature, classes_of], ids=lambda f: f.__name__
)
Feedback = Callable[[Tensor, Tensor, Tensor], Tensor]


@FEEDBACKS
def test_a_teacher_gets_no_gradient_and_its_student_does(feedback: Feedback) -> None:
    student, teacher = (made((2, 5, 4, 3), i, 0.0)[0].requires_grad_() for i in (0, 1))
    feedback(student, teacher, torch.ones(2, 4, 3, dtype=torch.bool)).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().sum() > 0


@FEEDBACKS
def test_feedback_without_a_valid_pixel_is_zero_with_zero_gradients(feedback: Feedback) -> None:
    student, teacher = (made((2, 5, 4, 3), i, 0.0)[0].requires_grad_() for i in (0, 1))
    loss = feedback(student, teacher, torch.zeros(2, 4, 3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert torch.equal(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize("feedback", [losses.hard_feedback, soft, feature])
def test_feedback_ignores_what_stands_under_ignored_pixels(feedback: Feedback) -> None:
    student, teacher = (made((2, 5, 4, 3), i, 0.0)[0] for i in (0, 1))
    valid = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(3)) < 0.5
    noise = torch.where(valid[:, None], 0.0, 50 * made((2, 5, 4, 3), 4, 0.0)[0])
    torch.testing.assert_close(
        feedback(student + noise, teacher - noise, valid), feedback(student, teacher, valid)
    )


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 0.0, 2.0])])
def test_ground_truth_losses_of_an_ignored_batch_are_zero_with_zero_gradients(
    weights: Tensor | None,
) -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    labels = torch.full((2, 4, 4), IGNORE, dtype=torch.uint8)
    counts = losses.count_labels(labels, 3, (4, 4), IGNORE)
    shown = losses.presence(labels, 3, IGNORE)
    total = (
        losses.pixel_cross_entropy(logits, labels, IGNORE, weights)
        + losses.count_cross_entropy(logits, counts, weights)
        + losses.classification(logits.mean((2, 3)), shown, losses.labelled_images(labels, IGNORE))
    )
    total.backward()
    assert total.item() == 0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 0.0, 2.0])])
def test_losses_of_an_ignored_batch_stay_zero_at_any_weight(weights: Tensor | None) -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    labels = torch.full((2, 4, 4), IGNORE, dtype=torch.uint8)
    counts = losses.count_labels(labels, 3, (4, 4), IGNORE)
    loss = losses.pixel_cross_entropy(logits, labels, IGNORE, weights)
    (1e6 * (loss + losses.count_cross_entropy(logits, counts, weights))).backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_negative_ignore_indices_work_for_wide_labels() -> None:
    logits, labels = made((2, 5, 6, 6), 0, 0.4)
    weights = torch.rand(5)
    wide = torch.where(labels == IGNORE, -100, labels.long())
    expected = losses.pixel_cross_entropy(logits, labels, IGNORE, weights)
    assert torch.equal(losses.pixel_cross_entropy(logits, wide, -100, weights), expected)
    assert torch.equal(losses.presence(wide, 5, -100), losses.presence(labels, 5, IGNORE))


def test_losses_of_half_precision_logits_are_float32() -> None:
    logits, labels = made((1, 5, 6, 6), 0, 0.2)
    for found in (
        losses.pixel_cross_entropy(logits.bfloat16(), labels, IGNORE),
        losses.soft_feedback(logits.bfloat16(), logits.bfloat16(), labels != IGNORE, 1.0),
    ):
        assert found.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_class_weights_of_another_precision_weigh_in_float32(dtype: torch.dtype) -> None:
    logits, labels = made((1, 5, 6, 6), 0, 0.2)
    counts = losses.count_labels(labels, 5, (6, 6), IGNORE)
    weights = torch.tensor([0.5, 1, 2, 0, 4])
    for loss, truth in (
        (partial(losses.pixel_cross_entropy, ignore_index=IGNORE), labels),
        (losses.count_cross_entropy, counts),
    ):
        found = loss(logits, truth, class_weights=weights.to(dtype))
        assert found.dtype == torch.float32
        assert torch.equal(found, loss(logits, truth, class_weights=weights))


def test_maps_meet_on_the_coarser_grid_of_each_axis() -> None:
    student, teacher = torch.randn(1, 3, 16, 5), torch.randn(1, 3, 8, 10, requires_grad=True)
    for join in (losses.on_one_grid, losses.pooled_to_student):
        a, b = join(student, teacher)
        assert a.shape == b.shape == (1, 3, 8, 5)
        assert not b.requires_grad


def test_a_linear_slope_is_read_at_the_coarser_cells_centres() -> None:
    fine = ((torch.arange(32) + 0.5) / 32).expand(1, 1, 32, 32)
    coarse = ((torch.arange(8) + 0.5) / 8).expand(1, 1, 8, 8)
    torch.testing.assert_close(losses.on_one_grid(fine, coarse)[0], coarse.contiguous())
    torch.testing.assert_close(losses.pooled_to_student(coarse, fine)[1], coarse.contiguous())


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_the_ramp_grows_from_zero_before_the_start_to_one_after_its_length(
    progress: float, start: float, length: float
) -> None:
    found = ramp(progress, start, length)
    assert 0 <= found <= 1
    if progress < start:
        assert found == 0
    if progress > start + length:
        assert found == 1
    assert ramp(min(1.0, progress + 0.1), start, length) >= found


def test_the_ramp_is_half_way_in_its_middle_and_a_step_without_length() -> None:
    assert ramp(0.3, 0.25, 0.1) == pytest.approx(0.5)
    assert [ramp(0.24, 0.25, 0), ramp(0.25, 0.25, 0)] == [0.0, 1.0]
