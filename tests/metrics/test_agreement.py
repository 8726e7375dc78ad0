"""Agreement of two tracers, worked by hand."""

import pytest
import torch

from provgen.metrics.agreement import agreement, mismatched, shared_sources

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
