"""Losses against plain means, their floors, and the batch in which no label was dropped."""

import math

import pytest
import torch
import torch.nn.functional as F

from provgen.attribution.scores import entropy
from provgen.training.losses import class_loss, denoising_loss, index_loss


@pytest.fixture
def logits(generator):
    return torch.randn(8, 5, generator=generator, dtype=torch.float64)


@pytest.fixture
def targets(generator):
    return torch.randn(8, 5, generator=generator, dtype=torch.float64).softmax(dim=1)


def test_index_loss_of_one_hot_targets_is_the_cross_entropy(logits):
    indices = torch.tensor([0, 4, 2, 1, 3, 3, 0, 2])
    expected = F.cross_entropy(logits, indices)
    torch.testing.assert_close(index_loss(logits, F.one_hot(indices, 5).double()), expected)


def test_index_loss_of_the_exact_targets_is_their_entropy(targets):
    # Logits are free up to a constant per row.
    shifted = targets.log() + torch.arange(8.0, dtype=torch.float64)[:, None]
    torch.testing.assert_close(index_loss(shifted, targets), entropy(targets).mean())


def test_index_loss_is_least_at_the_targets(targets):
    exact = targets.log().requires_grad_()
    (gradient,) = torch.autograd.grad(index_loss(exact, targets), exact)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)
    for row in range(8):
        moved = targets.log()
        moved[row, 0] += 0.1
        assert index_loss(moved, targets) > index_loss(exact, targets)


def test_ruled_out_examples_cost_nothing_and_get_no_gradient(logits, targets):
    lowest = torch.finfo(torch.float64).min
    masked_targets = targets.clone()
    masked_targets[:, :2] = 0
    free = logits.clone().requires_grad_()
    loss = index_loss(free.masked_fill(torch.arange(5) < 2, lowest), masked_targets)
    loss.backward()
    expected = -(masked_targets[:, 2:] * logits[:, 2:].log_softmax(dim=1)).sum(1).mean()
    torch.testing.assert_close(loss.detach(), expected)
    assert not free.grad[:, :2].any()
    assert free.grad.isfinite().all()


def test_class_loss_without_null_rows_is_zero_with_a_gradient_of_zeros(logits):
    free = logits.clone().requires_grad_()
    loss = class_loss(free, torch.arange(8) % 5, torch.zeros(8, dtype=torch.bool), 0.2)
    loss.backward()
    assert float(loss.detach()) == 0
    assert torch.equal(free.grad, torch.zeros_like(free))


def test_class_loss_by_hand():
    logits = torch.tensor([[0.0, 0.0], [3.0, -1.0], [0.0, math.log(3)], [9.0, 9.0]])
    labels = torch.tensor([1, 0, 0, 2])
    is_null = torch.tensor([True, False, True, True])
    # Row 1 kept its label, row 3 has none; log 2 and log 4 are left, over 4 rows times a dropout of one half.
    expected = (math.log(2) + math.log(4)) / 2
    assert float(class_loss(logits, labels, is_null, 0.5)) == pytest.approx(expected)


@pytest.mark.parametrize("label_dropout", [0.1, 0.5, 1.0])
def test_class_loss_is_on_average_the_plain_mean_over_null_rows(label_dropout, logits, generator):
    labels = torch.arange(8) % 5
    per_row = F.cross_entropy(logits, labels, reduction="none")
    draws = torch.rand(4000, 8, generator=generator) < label_dropout
    losses = torch.stack([class_loss(logits, labels, is_null, label_dropout) for is_null in draws])
    error = 4 * float(losses.std()) / len(draws) ** 0.5
    assert float(losses.mean()) == pytest.approx(float(per_row.mean()), abs=error + 1e-12)


def test_class_loss_of_a_kept_label_leaves_no_gradient(logits):
    free = logits.clone().requires_grad_()
    is_null = torch.arange(8) % 2 == 0
    class_loss(free, torch.arange(8) % 5, is_null, 0.5).backward()
    assert torch.equal(free.grad.abs().sum(1) > 0, is_null)


def test_the_mean_over_two_processes_is_the_loss_of_the_whole_batch(logits, targets):
    labels, is_null = torch.arange(8) % 5, torch.tensor([True, True, True, False, False, True, False, False])
    for whole, first, second in (
        (index_loss(logits, targets), *[index_loss(logits[r], targets[r]) for r in halves()]),
        (
            class_loss(logits, labels, is_null, 0.4),
            *[class_loss(logits[r], labels[r], is_null[r], 0.4) for r in halves()],
        ),
        (denoising_loss(logits, targets), *[denoising_loss(logits[r], targets[r]) for r in halves()]),
    ):
        torch.testing.assert_close((first + second) / 2, whole)


def halves():
    return slice(0, 4), slice(4, 8)


def test_denoising_loss_is_the_mean_squared_error(generator):
    predicted, noise = (torch.randn(3, 1, 2, 2, generator=generator) for _ in range(2))
    expected = sum(
        (a - b) ** 2 for a, b in zip(predicted.flatten().tolist(), noise.flatten().tolist(), strict=True)
    )
    assert float(denoising_loss(predicted, noise)) == pytest.approx(expected / 12, rel=1e-5)
