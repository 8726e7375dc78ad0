"""The distance ratio against its exact null (3^-d) and against copies; the calibrated distance by hand."""

import pytest
import torch

from provgen.errors import InputError
from provgen.metrics.copying import calibrated_distance, distance_ratio, share_memorized
from provgen.metrics.neighbors import distinct_rows, nearest


def ratios_of(queries, train):
    return distance_ratio(nearest(queries, distinct_rows(train), 2, chunk_size=4096))


@pytest.fixture
def points(generator):
    return torch.randn(70, 5, generator=generator), torch.randn(200, 5, generator=generator)


def test_exact_copies_are_all_memorized(points):
    _, train = points
    ratios = ratios_of(train, train)
    assert torch.equal(ratios, torch.zeros(200, dtype=torch.float64))
    estimate = share_memorized(ratios)
    assert (estimate.value, estimate.high, estimate.n) == (1.0, 1.0, 200)


def test_copies_of_an_image_that_is_there_twice_are_memorized(points):
    _, train = points
    doubled = torch.cat([train, train, train[:3]])
    assert share_memorized(ratios_of(train + 1e-6, doubled)).value == 1
    torch.testing.assert_close(ratios_of(train + 0.1, doubled), ratios_of(train + 0.1, train))


def test_distance_ratio_of_a_worked_example():
    train = torch.tensor([[0.0, 0.0], [0.0, 0.0], [4.0, 0.0]])
    queries = torch.tensor([[1.0, 0.0], [2.0, 0.0], [4.0, 3.0], [-4.0, 0.0]])
    expected = torch.tensor([1 / 3, 1.0, 3 / 5, 1 / 2], dtype=torch.float64)
    torch.testing.assert_close(ratios_of(queries, train), expected)


def test_the_threshold_itself_is_not_memorized():
    assert share_memorized(torch.tensor([0.25, 0.5, 0.75]), threshold=0.5).value == pytest.approx(1 / 3)


@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_independent_points_fall_below_a_threshold_with_its_power_of_the_dimension(dimension, generator):
    # Locally uniform: queries well inside a cube of uniform training points, so that no border is felt,
    # and far fewer than these, so that few share a neighbour and the error is nearly binomial.
    train = torch.rand(12_000, dimension, generator=generator)
    queries = 0.25 + 0.5 * torch.rand(1000, dimension, generator=generator)
    ratios = ratios_of(queries, train)
    for threshold in (1 / 3, 1 / 2, 4 / 5):
        null = threshold**dimension
        standard_error = (null * (1 - null) / len(queries)) ** 0.5
        assert share_memorized(ratios, threshold).value == pytest.approx(null, abs=4 * standard_error)


def test_permuting_train_keeps_the_ratios(points, generator):
    queries, train = points
    order = torch.randperm(len(train), generator=generator)
    assert torch.equal(ratios_of(queries, train[order]), ratios_of(queries, train))


def test_one_distinct_training_image_is_refused():
    with pytest.raises(InputError, match="2 distinct ones, got 1"):
        ratios_of(torch.ones(1, 4), torch.zeros(5, 4))
    with pytest.raises(InputError, match="0 observations"):
        share_memorized(torch.empty(0))


def test_a_copy_has_no_calibrated_distance_and_equal_distances_have_two():
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    assert calibrated_distance(nearest(torch.zeros(1, 3), corners, 8)).tolist() == pytest.approx([2])
    assert calibrated_distance(nearest(corners, corners, 8)).tolist() == [0] * 8
    assert calibrated_distance(nearest(torch.ones(2, 3), torch.ones(5, 3), 5)).tolist() == [0, 0]


@pytest.mark.parametrize("copies", [1, 3, 5])
def test_a_near_copy_of_what_is_there_often_stands_out_less(copies):
    # 5 nearest: `copies` at distance 1, the others at 3.
    train = torch.cat([torch.tensor([[1.0]]).expand(copies, 1), torch.tensor([[-3.0]]).expand(6, 1)])
    expected = 2 * 1 / ((copies + 3 * (5 - copies)) / 5)
    assert calibrated_distance(nearest(torch.zeros(1, 1), train, 5)).tolist() == pytest.approx([expected])
