"""Recall of a search against hand-worked rows and against sets."""

import pytest
import torch

from provgen.metrics.agreement import beam_recall

LOWEST = torch.finfo(torch.float32).min


def test_a_search_of_everything_misses_nothing(generator):
    logits = torch.randn(20, 30, generator=generator)
    estimate = beam_recall(logits, logits, 5)
    assert (estimate.value, estimate.low, estimate.high, estimate.n) == (1.0, 1.0, 1.0, 20)


@pytest.mark.parametrize(("k", "recall"), [(1, (1 + 0) / 2), (2, (1 / 2 + 1 / 2) / 2), (3, (2 / 3 + 1 / 3) / 2)])
def test_recall_of_two_rows_worked_by_hand(k, recall):
    exhaustive = torch.tensor([[5.0, 4.0, 3.0, 2.0], [2.0, 3.0, 4.0, 5.0]])
    searched = torch.tensor([[5.0, LOWEST, 3.0, LOWEST], [2.0, LOWEST, 4.0, LOWEST]])
    # Row 0 finds 0 then 2; row 1 finds 2 then 0, of 3, 2, 1: with k = 3, 2 alone is wanted of what it found.
    assert beam_recall(searched, exhaustive, k).value == pytest.approx(recall)


def test_recall_is_that_of_sets(generator):
    exhaustive = torch.randn(40, 25, generator=generator)
    unseen = torch.rand(40, 25, generator=generator) < 0.4
    searched = exhaustive.masked_fill(unseen, LOWEST)
    shares = []
    for query in range(40):
        best = set(exhaustive[query].argsort(descending=True)[:6].tolist())
        seen = [i for i in exhaustive[query].argsort(descending=True).tolist() if not unseen[query, i]]
        shares.append(len(best & set(seen[:6])) / 6)
    assert 0.3 < sum(shares) / 40 < 0.9
    assert beam_recall(searched, exhaustive, 6).value == pytest.approx(sum(shares) / 40)


def test_what_is_ruled_out_is_not_asked_for():
    exhaustive = torch.tensor([[3.0, 2.0, LOWEST, LOWEST]])
    assert beam_recall(exhaustive, exhaustive, 4).value == 1
    assert beam_recall(torch.tensor([[LOWEST, 2.0, LOWEST, LOWEST]]), exhaustive, 3).value == 0.5
    nothing = torch.full((1, 4), LOWEST)
    assert beam_recall(nothing, exhaustive, 2).value == 0
