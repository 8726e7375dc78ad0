"""Neighbours against brute force, copies and duplicates included."""

import pytest
import torch

from provgen.metrics.neighbors import nearest, nearest_others


@pytest.fixture
def points(generator):
    return torch.randn(70, 5, generator=generator), torch.randn(200, 5, generator=generator)


def test_neighbors_equal_brute_force(points):
    queries, train = points
    expected = torch.cdist(queries.double(), train.double(), compute_mode="donot_use_mm_for_euclid_dist")
    found = nearest(queries, train, 7)
    torch.testing.assert_close(found.distances, expected.sort(dim=1).values[:, :7], rtol=0, atol=1e-12)
    assert torch.equal(found.indices, expected.argsort(dim=1)[:, :7])


@pytest.mark.parametrize("chunk_size", [7, 64, 199, 200, 10_000])
def test_chunk_size_changes_nothing(points, chunk_size, monkeypatch):
    queries, train = points
    expected = nearest(queries, train, 9)
    monkeypatch.setattr("provgen.metrics.neighbors.CHUNK", chunk_size)
    found = nearest(queries, train, 9)
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


def test_lowest_index_comes_first_among_duplicates(monkeypatch):
    monkeypatch.setattr("provgen.metrics.neighbors.CHUNK", 2)
    train = torch.tensor([[9.0], [1.0], [5.0], [1.0], [1.0]])
    assert nearest(torch.tensor([[1.0]]), train, 2).indices.tolist() == [[1, 3]]


def test_all_training_rows_can_be_asked_for(points, monkeypatch):
    monkeypatch.setattr("provgen.metrics.neighbors.CHUNK", 16)
    queries, train = points
    found = nearest(queries, train, len(train))
    assert torch.equal(found.indices.sort(dim=1).values, torch.arange(200).expand(70, -1))


def test_permuting_train_permutes_indices_and_keeps_distances(points, generator):
    queries, train = points
    order = torch.randperm(len(train), generator=generator)
    found, permuted = nearest(queries, train, 4), nearest(queries, train[order], 4)
    torch.testing.assert_close(permuted.distances, found.distances, rtol=0, atol=0)
    assert torch.equal(order[permuted.indices], found.indices)


def test_neighbors_among_themselves_equal_brute_force(points):
    _, rows = points
    distances = torch.cdist(rows.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist")
    expected = distances.fill_diagonal_(torch.inf).sort(dim=1)
    wanted = torch.tensor([3, 199, 0, 3])
    found = nearest_others(rows, wanted, 4)
    torch.testing.assert_close(found.distances, expected.values[wanted, :4], rtol=0, atol=1e-12)
    assert torch.equal(found.indices, expected.indices[wanted, :4])


def test_a_row_is_not_its_own_neighbor_among_many_duplicates():
    rows = torch.cat([torch.zeros(30, 2), torch.ones(1, 2)])
    found = nearest_others(rows, torch.arange(31), 2)
    assert (found.indices != torch.arange(31)[:, None]).all()
    assert torch.equal(found.distances[:30], torch.zeros(30, 2, dtype=torch.float64))
    torch.testing.assert_close(found.distances[30], torch.full((2,), 2**0.5, dtype=torch.float64))
