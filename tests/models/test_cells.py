"""Cells against brute force, planted clusters and hand-worked counts."""

import math
import warnings

import pytest
import torch

from provgen.models.groups import (
    LOG_NOBODY,
    class_cells,
    kmeans_cells,
    log_class_shares,
    log_softmax_within,
    place_anchors,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_group_is_normalised_apart_however_far_the_others_are(dtype, generator):
    groups = torch.tensor([3, 0, 1, 0, 3, 3, 1])  # group 2 is empty
    logits = torch.randn(4, 7, generator=generator, dtype=dtype) + 1e5 * groups
    actual = log_softmax_within(logits, groups, 4)
    for group in (0, 1, 3):
        torch.testing.assert_close(actual[:, groups == group], logits[:, groups == group].log_softmax(dim=1))


def test_its_gradient_is_that_of_softmaxes_one_by_one(generator):
    groups = torch.tensor([1, 0, 1, 0, 1])
    logits = torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    (actual,) = torch.autograd.grad((weights * log_softmax_within(logits, groups, 2)).sum(), logits)
    parts = [(weights[:, groups == g] * logits[:, groups == g].log_softmax(dim=1)).sum() for g in (0, 1)]
    (expected,) = torch.autograd.grad(sum(parts), logits)
    torch.testing.assert_close(actual, expected)


def test_planted_clusters_become_cells(generator):
    planted = torch.arange(30) % 3
    rows = 20.0 * planted[:, None] + torch.randn(30, 4, generator=generator, dtype=torch.float64)
    cells = kmeans_cells(rows, 3)
    assert sorted(cells.unique().tolist()) == [0, 1, 2]
    assert all(len(cells[planted == cluster].unique()) == 1 for cluster in range(3))


def test_fewer_distinct_images_than_cells_are_no_error_and_no_warning():
    rows = torch.tensor([[0.0], [0.0], [1.0], [1.0]], dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cells = kmeans_cells(rows, 3)
        points, weights = place_anchors(rows, cells, 3, 2)
    assert cells[0] == cells[1] != cells[2] == cells[3]
    assert weights.exp().sum().item() == pytest.approx(4)
    assert points.isfinite().all()


def test_classes_are_numbered_without_gaps():
    assert class_cells(torch.tensor([7, 2, 10, 2])).tolist() == [1, 0, 2, 0]


def test_with_an_anchor_per_example_the_anchors_are_the_examples(generator):
    rows = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    cells = torch.tensor([0, 2, 0, 2, 2, 0, 0])
    points, weights = place_anchors(rows, cells, 3, 5)
    for cell, size in ((0, 4), (1, 0), (2, 3)):
        own, weight = points[5 * cell : 5 * cell + 5], weights[5 * cell : 5 * cell + 5]
        assert weight.tolist() == [0.0] * size + [LOG_NOBODY] * (5 - size)
        near = torch.cdist(rows[cells == cell], own[:size]) < 1e-9
        assert (near.sum(0) == 1).all()
        assert (near.sum(1) == 1).all()


def test_fewer_anchors_sit_among_their_examples_and_count_them():
    rows = torch.tensor([[0.0], [0.2], [0.4], [9.0], [50.0]], dtype=torch.float64)
    points, weights = place_anchors(rows, torch.tensor([1, 1, 1, 1, 0]), 2, 2)
    found = sorted(zip(points[2:].flatten().tolist(), weights[2:].exp().tolist(), strict=True))
    assert [pair[0] for pair in found] == pytest.approx([0.2, 9.0])
    assert [pair[1] for pair in found] == pytest.approx([3, 1])


def test_shares_of_the_classes_in_cells_worked_by_hand():
    # Labels 0 and 1, 2 stands for none; cell 1 is empty.
    shares = log_class_shares(torch.tensor([0, 0, 0, 2, 2]), torch.tensor([0, 1, 1, 2, 0]), 3, 2)
    half, third = math.log(1 / 2), math.log(1 / 3)
    expected = torch.tensor([[third, -math.inf, half], [math.log(2 / 3)] + 2 * [-math.inf], [0, -math.inf, 0]])
    torch.testing.assert_close(shares, expected)
