"""Agreement of two tracers, and recall of a search, worked by hand and against sets."""

import pytest
import torch

from provgen.metrics.agreement import agreement, beam_recall, mismatched, shared_sources

LOWEST = torch.finfo(torch.float32).min
FIRST = torch.tensor([[4, 7], [1, 2], [3, 5], [6, 8]])


def test_agreement_by_hand():
    second = torch.tensor([[4, 7], [2, 1], [3, 9], [0, 9]])
    found = agreement(FIRST, second)
    assert found.top1.value == 2 / 4
    assert found.top1.n == 4
    assert found.overlap.value == pytest.approx((1 + 1 + 0.5 + 0) / 4)
    assert found.overlap.low <= found.overlap.value <= found.overlap.high


def test_shared_sources_by_hand():
    second = torch.tensor([[4, 7], [2, 1], [3, 9], [0, 9]])
    assert shared_sources(FIRST, second).tolist() == [1, 1, 0.5, 0]


def test_a_tracer_agrees_with_itself_and_not_with_one_that_names_others():
    same, other = agreement(FIRST, FIRST), agreement(FIRST, FIRST + 10)
    assert (same.top1.value, same.overlap.value) == (1, 1)
    assert (other.top1.value, other.overlap.value) == (0, 0)


def test_agreement_is_symmetric():
    second = torch.tensor([[7, 4], [1, 9], [5, 3], [8, 6]])
    assert agreement(FIRST, second) == agreement(second, FIRST)


def test_samples_are_paired_with_the_next_of_their_class():
    labels = torch.tensor([0, 1, 0, 2, 1, 0])
    those, others = mismatched(labels)
    assert dict(zip(those.tolist(), others.tolist(), strict=True)) == {0: 2, 2: 5, 5: 0, 1: 4, 4: 1}


def test_samples_that_are_alone_in_their_classes_have_no_pairs():
    assert [len(side) for side in mismatched(torch.arange(4))] == [0, 0]


def test_pairing_stays_in_the_class_uses_every_sample_once_and_moves_all_that_can_move(generator):
    labels = torch.randint(5, (100,), generator=generator)
    those, others = mismatched(labels)
    assert torch.equal(labels[those], labels[others])
    assert torch.equal(those.sort().values, torch.arange(100))
    assert torch.equal(others.sort().values, torch.arange(100))
    assert not (those == others).any()


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
