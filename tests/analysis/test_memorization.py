"""Neighbours against brute force; the distance ratio against its exact null (3^-d) and against copies."""

import pytest
import torch

from provgen.analysis.memorization import distance_ratio, nearest, share_memorized
from provgen.errors import InputError


@pytest.fixture
def points(generator):
    return torch.randn(70, 5, generator=generator), torch.randn(200, 5, generator=generator)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_neighbors_equal_brute_force(points):
    queries, train = points
    expected = torch.cdist(queries.double(), train.double(), compute_mode="donot_use_mm_for_euclid_dist")
    found = nearest(queries, train, 7)
    torch.testing.assert_close(found.distances, expected.sort(dim=1).values[:, :7], rtol=0, atol=1e-12)
    assert torch.equal(found.indices, expected.argsort(dim=1)[:, :7])


@pytest.mark.parametrize("chunk_size", [7, 64, 199, 200, 10_000])
def test_chunk_size_changes_nothing(points, chunk_size):
    queries, train = points
    expected = nearest(queries, train, 9)
    found = nearest(queries, train, 9, chunk_size=chunk_size)
    assert torch.equal(found.distances, expected.distances)
    assert torch.equal(found.indices, expected.indices)


def test_distance_of_a_near_copy_far_from_the_origin_is_exact():
    train = torch.tensor([[1e6, 1e6], [1e6 + 4, 1e6]], dtype=torch.float64)
    queries = train[:1] + torch.tensor([[0.0, 1e-7]], dtype=torch.float64)
    expected = float(queries[0, 1] - train[0, 1])
    assert nearest(queries, train, 1).distances.item() == expected > 0


def test_float32_copies_are_at_distance_zero(generator):
    train = torch.rand(50, 784, generator=generator) * 255
    found = nearest(train, train, 1)
    assert torch.equal(found.distances, torch.zeros(50, 1, dtype=torch.float64))
    assert torch.equal(found.indices[:, 0], torch.arange(50))


def test_integer_images_are_taken_as_they_are(generator):
    train = torch.randint(0, 256, (30, 64), generator=generator, dtype=torch.uint8)
    expected = torch.cdist(train.double(), train.double()).sort(dim=1).values[:, :3]
    torch.testing.assert_close(nearest(train, train, 3).distances, expected, rtol=1e-9, atol=1e-4)


def test_lowest_index_comes_first_among_duplicates():
    train = torch.tensor([[9.0], [1.0], [5.0], [1.0], [1.0]])
    assert nearest(torch.tensor([[1.0]]), train, 2, chunk_size=2).indices.tolist() == [[1, 3]]


def test_all_training_rows_can_be_asked_for(points):
    queries, train = points
    found = nearest(queries, train, len(train), chunk_size=16)
    assert torch.equal(found.indices.sort(dim=1).values, torch.arange(200).expand(70, -1))


def test_permuting_train_permutes_indices_and_keeps_distances(points, generator):
    queries, train = points
    order = torch.randperm(len(train), generator=generator)
    found, permuted = nearest(queries, train, 4), nearest(queries, train[order], 4)
    torch.testing.assert_close(permuted.distances, found.distances, rtol=0, atol=0)
    assert torch.equal(order[permuted.indices], found.indices)


def test_exact_copies_are_all_memorized(points):
    _, train = points
    ratios = distance_ratio(train, train)
    assert torch.equal(ratios, torch.zeros(200, dtype=torch.float64))
    estimate = share_memorized(ratios)
    assert (estimate.value, estimate.high, estimate.n) == (1.0, 1.0, 200)


def test_copies_of_an_image_that_is_there_twice_are_memorized(points):
    _, train = points
    doubled = torch.cat([train, train, train[:3]])
    assert share_memorized(distance_ratio(train + 1e-6, doubled)).value == 1
    torch.testing.assert_close(distance_ratio(train + 0.1, doubled), distance_ratio(train + 0.1, train))


def test_distance_ratio_of_a_worked_example():
    train = torch.tensor([[0.0, 0.0], [0.0, 0.0], [4.0, 0.0]])
    queries = torch.tensor([[1.0, 0.0], [2.0, 0.0], [4.0, 3.0], [-4.0, 0.0]])
    expected = torch.tensor([1 / 3, 1.0, 3 / 5, 1 / 2], dtype=torch.float64)
    torch.testing.assert_close(distance_ratio(queries, train), expected)


def test_the_threshold_itself_is_not_memorized():
    assert share_memorized(torch.tensor([0.25, 0.5, 0.75]), threshold=0.5).value == pytest.approx(1 / 3)


@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_independent_points_fall_below_a_threshold_with_its_power_of_the_dimension(dimension, generator):
    # Locally uniform: queries well inside a cube of uniform training points, so that no border is felt,
    # and far fewer than these, so that few share a neighbour and the error is nearly binomial.
    train = torch.rand(12_000, dimension, generator=generator)
    queries = 0.25 + 0.5 * torch.rand(1000, dimension, generator=generator)
    ratios = distance_ratio(queries, train, chunk_size=4096)
    for threshold in (1 / 3, 1 / 2, 4 / 5):
        null = threshold**dimension
        standard_error = (null * (1 - null) / len(queries)) ** 0.5
        assert share_memorized(ratios, threshold).value == pytest.approx(null, abs=4 * standard_error)


def test_permuting_train_keeps_the_ratios(points, generator):
    queries, train = points
    order = torch.randperm(len(train), generator=generator)
    assert torch.equal(distance_ratio(queries, train[order]), distance_ratio(queries, train))


def test_one_distinct_training_image_is_refused():
    with pytest.raises(InputError, match="2 distinct training images, got 1"):
        distance_ratio(torch.ones(1, 4), torch.zeros(5, 4))
    with pytest.raises(InputError, match="0 observations"):
        share_memorized(torch.empty(0))
