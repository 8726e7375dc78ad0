"""A class, then a slot: against the closed form, the class head, and sums by class."""

import pytest
import torch

from provgen.models import index_heads
from provgen.models.index_heads import ClassConditionalHead

CLASSES = 3


@pytest.fixture
def class_logits(generator):
    return torch.randn(20, CLASSES, generator=generator, dtype=torch.float64)


def test_with_as_many_ranks_as_slots_and_the_exact_class_it_is_the_closed_form(random_case, assert_same_posterior):
    case = random_case(14)
    exact_classes = case.class_probs(case.closed_form)[:, :CLASSES].log() + 3
    logits = case.logits(case.exact(ClassConditionalHead), class_logits=exact_classes)
    assert_same_posterior(logits, case.closed_form)


def test_classes_that_are_maps_of_shared_slots_need_no_more_ranks_than_the_slots_have(
    head_case, generator, assert_same_posterior
):
    # Three classes of 12 are slight distortions of the same 12 points in 4 of 64 dimensions. The stacked matrix
    # has rank 4 if every point finds its slot, and 12 if not; the head has rank 6.
    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shared, basis = draw(12, 4), torch.linalg.qr(draw(64, 4)).Q.T
    points = [shared @ (torch.eye(4, dtype=torch.float64) + 0.03 * draw(4, 4)) for _ in range(CLASSES)]
    order = torch.randperm(36, generator=generator)
    train = (0.3 * torch.cat(points) @ basis)[order].view(36, 1, 8, 8)
    labels = torch.arange(CLASSES).repeat_interleave(12)[order]
    case = head_case(train, labels)
    head = case.exact(ClassConditionalHead, width=4)
    assert head.slots.shape == (12, 6)
    logits, a = case.logits(head), case.alpha_bar[:, None]
    for label in range(CLASSES):
        own = labels == label
        faded = a.sqrt()[:, None] * train[own].flatten(1)
        squares = (case.noisy.flatten(1)[:, None] - faded).square().sum(2)
        assert_same_posterior(logits[:, own], (-squares / (2 * (1 - a))).softmax(1))


def test_classes_get_what_the_class_head_says(random_case, class_logits):
    case = random_case(13)
    probs = case.logits(case.random(ClassConditionalHead), class_logits=class_logits).exp()
    torch.testing.assert_close(probs.sum(1), torch.ones(20, dtype=torch.float64))
    torch.testing.assert_close(case.class_probs(probs)[:, :CLASSES], class_logits.softmax(1))


def test_examples_without_a_class_start_at_their_share(random_case, class_logits):
    case = random_case(14, relabelled={1: CLASSES})
    probs = case.logits(case.started(ClassConditionalHead), class_logits=class_logits).exp()
    share = torch.full((20,), 5 / 14, dtype=torch.float64)
    torch.testing.assert_close(case.class_probs(probs)[:, CLASSES], share)


def test_the_classes_share_what_examples_without_a_class_leave(random_case, class_logits):
    case = random_case(16)
    case.labels[:5] = CLASSES
    parts = case.class_probs(case.logits(case.random(ClassConditionalHead), class_logits=class_logits).exp())
    assert parts[:, CLASSES].std() > 0.01, "it tells which images have no class"
    torch.testing.assert_close(parts[:, :CLASSES], (1 - parts[:, CLASSES:]) * class_logits.softmax(1))


def test_with_a_branch_of_its_own_and_an_anchor_per_example_it_is_the_closed_form(
    random_case, assert_same_posterior, monkeypatch
):
    monkeypatch.setattr(index_heads, "CLASS_ANCHORS", 100)
    case = random_case(14, relabelled={1: CLASSES})
    head = case.exact(ClassConditionalHead, has_class_branch=True)
    with torch.no_grad():
        weights = head.class_branch.weights
        weights[weights < 0] = -1e30  # anchors that no example took
    assert head.unlabelled is None
    assert_same_posterior(case.logits(head), case.closed_form)


def test_a_class_without_examples_leaves_the_others_their_odds(random_case, class_logits):
    case = random_case(8, relabelled={1: 2})
    probs = case.logits(case.random(ClassConditionalHead), class_logits=class_logits).softmax(1)
    torch.testing.assert_close(case.class_probs(probs)[:, [0, 2]], class_logits[:, [0, 2]].softmax(1))


def test_its_size_grows_with_the_largest_class():
    def size(num_examples, num_slots):
        with torch.device("meta"):
            head = ClassConditionalHead(
                [(4, 8)], num_examples=num_examples, width=6, num_classes=10, num_slots=num_slots
            )
        return sum(p.numel() for p in head.parameters())

    embedding, rank = 6 * 4 * 64 + 6, 9
    assert size(1000, 100) == embedding + 10 * rank * 6 + 100 * rank + 1000 + 1
    assert size(1000, 101) - size(1000, 100) == rank
    assert size(1001, 100) - size(1000, 100) == 1
