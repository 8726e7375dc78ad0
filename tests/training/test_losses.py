"""Losses against plain means and their floors, and batches of which no row counts."""

import math

import pytest
import torch
import torch.nn.functional as F

from provgen.generators.closed_form import entropy
from provgen.training.trainer import class_loss, index_loss


@pytest.fixture
def logits(generator):
    return torch.randn(8, 5, generator=generator, dtype=torch.float64)


@pytest.fixture
def targets(generator):
    return torch.randn(8, 5, generator=generator, dtype=torch.float64).softmax(dim=1)


def full_index_loss(logits, targets):
    return index_loss(logits, targets, torch.ones(len(logits), dtype=torch.bool), 1.0)


def test_index_loss_of_one_hot_targets_is_the_cross_entropy(logits):
    indices = torch.tensor([0, 4, 2, 1, 3, 3, 0, 2])
    expected = F.cross_entropy(logits, indices)
    torch.testing.assert_close(full_index_loss(logits, F.one_hot(indices, 5).double()), expected)


def test_index_loss_of_the_exact_targets_is_their_entropy(targets):
    # Logits are free up to a constant per row.
    shifted = targets.log() + torch.arange(8.0, dtype=torch.float64)[:, None]
    torch.testing.assert_close(full_index_loss(shifted, targets), entropy(targets).mean())


def test_index_loss_is_least_at_the_targets(targets):
    exact = targets.log().requires_grad_()
    (gradient,) = torch.autograd.grad(full_index_loss(exact, targets), exact)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)
    for row in range(8):
        moved = targets.log()
        moved[row, 0] += 0.1
        assert full_index_loss(moved, targets) > full_index_loss(exact, targets)


def test_ruled_out_examples_cost_nothing_and_get_no_gradient(logits, targets):
    lowest = torch.finfo(torch.float64).min
    masked_targets = targets.clone()
    masked_targets[:, :2] = 0
    free = logits.clone().requires_grad_()
    loss = full_index_loss(free.masked_fill(torch.arange(5) < 2, lowest), masked_targets)
    loss.backward()
    expected = -(masked_targets[:, 2:] * logits[:, 2:].log_softmax(dim=1)).sum(1).mean()
    torch.testing.assert_close(loss.detach(), expected)
    assert not free.grad[:, :2].any()
    assert free.grad.isfinite().all()


IS_COVERED = torch.tensor([True, False, True, True, False, False, True, False])


def test_with_full_coverage_the_index_loss_is_the_plain_mean(logits, targets):
    plain = -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()
    assert torch.equal(full_index_loss(logits, targets), plain)


def test_only_rows_of_covered_examples_have_an_index_loss(logits, targets):
    per_row = torch.stack([full_index_loss(logits[i : i + 1], targets[i : i + 1]) for i in range(8)])
    # Four of eight rows, over eight times a coverage of a quarter.
    expected = (per_row[0] + per_row[2] + per_row[3] + per_row[6]) / 2
    torch.testing.assert_close(index_loss(logits, targets, IS_COVERED, 0.25), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("is_covered", [IS_COVERED, torch.zeros(8, dtype=torch.bool)])
def test_rows_of_uncovered_examples_leave_no_gradient(is_covered, dtype, logits):
    indices = torch.where(is_covered, 3, 0)
    targets = F.one_hot(indices, 5).to(dtype)
    free = logits.clone().to(dtype).requires_grad_()
    # Their own example is not among the columns that the head can name.
    masked = free.masked_fill(torch.arange(5) < 2, torch.finfo(dtype).min)
    loss = index_loss(masked, targets, is_covered, 0.5)
    loss.backward()
    assert torch.equal(free.grad.abs().sum(1) > 0, is_covered)
    expected = F.cross_entropy(logits[:, 2:], torch.ones(8, dtype=torch.int64), reduction="none")
    assert float(loss.detach()) == pytest.approx(float((expected * is_covered).sum()) / 4, rel=1e-5)


def test_the_index_loss_over_drawn_rows_is_on_average_the_mean_over_covered_examples(logits, targets, generator):
    # Eight examples, half of them covered; each batch draws five of them with replacement.
    draws = torch.randint(8, (4000, 5), generator=generator)
    losses = torch.stack([index_loss(logits[r], targets[r], IS_COVERED[r], 0.5) for r in draws])
    expected = full_index_loss(logits[IS_COVERED], targets[IS_COVERED])
    error = 4 * float(losses.std()) / len(draws) ** 0.5
    assert float(losses.mean()) == pytest.approx(float(expected), abs=error)


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
    for loss in (
        lambda r: index_loss(logits[r], targets[r], IS_COVERED[r], 0.4),
        lambda r: class_loss(logits[r], labels[r], is_null[r], 0.4),
    ):
        torch.testing.assert_close((loss(slice(0, 4)) + loss(slice(4, 8))) / 2, loss(slice(0, 8)))
