"""Slots against brute force, planted matches, and the best approximation there is."""

from itertools import permutations

import pytest
import torch

from provgen.models.groups import MATCH_AT_ONCE, assign_slots, factorise, group_means, match


def squared_distance(points, slots, matched) -> float:
    return float((points - slots[matched]).square().sum())


def test_a_few_points_are_matched_as_well_as_possible(generator):
    points = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    slots = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    best = min(squared_distance(points, slots, list(taken)) for taken in permutations(range(6), 4))
    assert squared_distance(points, slots, match(points, slots)) == pytest.approx(best)


def test_many_points_find_their_own_copies(generator):
    slots = torch.randn(3 * MATCH_AT_ONCE, 2, generator=generator, dtype=torch.float64)
    order = torch.randperm(len(slots), generator=generator)
    assert torch.equal(match(slots[order], slots), order)


@pytest.mark.parametrize("count", [0, 1, 700, 2 * MATCH_AT_ONCE + 1])
def test_no_two_points_share_a_slot_when_there_are_too_many_for_one_match(count, generator):
    slots = torch.randn(2 * MATCH_AT_ONCE + 1, 2, generator=generator, dtype=torch.float64)
    points = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    assert len(match(points, slots).unique()) == count


def test_many_points_are_matched_far_better_than_at_random(generator):
    slots = torch.randn(2 * MATCH_AT_ONCE + 1, 2, generator=generator, dtype=torch.float64)
    points = torch.randn(700, 2, generator=generator, dtype=torch.float64)
    at_random = torch.randperm(len(slots), generator=generator)[:700]
    matched = match(points, slots)
    assert squared_distance(points, slots, matched) < squared_distance(points, slots, at_random) / 10


def test_alike_examples_of_all_groups_get_the_same_slot(generator):
    places = 10 * torch.randn(7, 4, generator=generator, dtype=torch.float64)
    # Group 1 is the largest; the others lack some of the places.
    kind = torch.cat([torch.randperm(7, generator=generator)[:size] for size in (5, 7, 4)])
    groups = torch.tensor([0] * 5 + [1] * 7 + [2] * 4)
    noise = 0.1 * torch.randn(16, 4, generator=generator, dtype=torch.float64)
    slots = assign_slots(places[kind] + noise, groups, num_slots=8)
    for one, other in ((kind, slots), (slots, kind)):
        assert all(len(other[one == value].unique()) == 1 for value in one.unique())


def test_products_are_as_near_as_their_rank_allows(generator):
    groups = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
    slots = torch.tensor([0, 1, 2, 3, 4, 4, 0, 2, 3, 2, 1, 0])
    points = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    table = torch.zeros(5, 9, dtype=torch.float64)
    for point, group, slot in zip(points, groups.tolist(), slots.tolist(), strict=True):
        table[slot, 3 * group : 3 * group + 3] = point
    values = torch.linalg.svdvals(table)
    for rank in (1, 3, 5, 8):
        shared, maps = factorise(points, groups * 5 + slots, (3, 5), rank)
        assert (shared.shape, maps.shape) == ((5, rank), (3, rank, 3))
        made = torch.cat([shared @ group_map for group_map in maps], dim=1)
        # Eckart and Young 1936: the tail of the singular values is the least error.
        torch.testing.assert_close((made - table).square().sum(), values[rank:].square().sum())


def test_means_of_groups(generator):
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [7.0, 7.0]])
    means = group_means(rows, torch.tensor([2, 2, 0]), 4)
    assert means.tolist() == [[7, 7], [0, 0], [2, 3], [0, 0]]
