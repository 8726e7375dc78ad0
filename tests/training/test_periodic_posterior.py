"""The closed form of a learning generator: made anew every so many calls, and asked as it is in between."""

import pytest
import torch

from provgen.generators.closed_form import ClosedFormPosterior
from provgen.training.targets import UPDATE_EVERY, PeriodicPosterior

QUERIES = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(6, 1, 1, 1)
ALPHA_BAR = torch.full((6,), 0.7, dtype=torch.float64)
NULL = torch.full((6,), 1)


def closed_form(shift: float) -> ClosedFormPosterior:
    images = torch.tensor([-0.5, 0.1, 0.9], dtype=torch.float64).reshape(3, 1, 1, 1) * shift
    return ClosedFormPosterior(images, torch.zeros(3, dtype=torch.int64), null_label=1)


@pytest.fixture
def made():
    """The closed forms that were made, the newest last."""
    return []


@pytest.fixture
def posterior(made):
    def make() -> ClosedFormPosterior:
        made.append(closed_form(1.0 + len(made)))
        return made[-1]

    return PeriodicPosterior(make, checkpoint_every=3 * UPDATE_EVERY)


def test_nothing_is_made_before_it_is_asked_for(posterior, made):
    assert made == []
    posterior.probs(QUERIES, ALPHA_BAR, NULL)
    assert len(made) == 1


def test_it_is_made_anew_after_so_many_calls_and_not_before(posterior, made):
    counts = []
    for _ in range(2 * UPDATE_EVERY + 1):
        posterior.probs(QUERIES, ALPHA_BAR, NULL)
        counts.append(len(made))
    assert counts == [1] * UPDATE_EVERY + [2] * UPDATE_EVERY + [3]


def test_answers_are_those_of_the_newest(posterior, made):
    for call in range(UPDATE_EVERY + 2):
        probs = posterior.probs(QUERIES, ALPHA_BAR, NULL)
        expected = closed_form(1.0 + call // UPDATE_EVERY).probs(QUERIES, ALPHA_BAR, NULL)
        assert torch.equal(probs, expected)
    assert not torch.equal(probs, closed_form(1.0).probs(QUERIES, ALPHA_BAR, NULL))


def test_a_query_is_passed_on_as_it_is(posterior):
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    alpha_bar = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    whole = posterior.probs(QUERIES, alpha_bar, labels)
    assert torch.equal(whole, closed_form(1.0).probs(QUERIES, alpha_bar, labels))
    torch.testing.assert_close(posterior.probs(QUERIES[2:4], alpha_bar[2:4], labels[2:4]), whole[2:4])


@pytest.mark.parametrize(
    ("checkpoint_every", "every"), [(20, 20), (250, 10), (300, 20), (18, 18), (7, 7), (34, 17), (23, 1)]
)
def test_it_is_made_at_every_checkpoint(checkpoint_every, every, made):
    posterior = PeriodicPosterior(lambda: made.append(0) or closed_form(1.0), checkpoint_every=checkpoint_every)
    for _ in range(checkpoint_every):
        posterior.probs(QUERIES, ALPHA_BAR, NULL)
    assert len(made) == checkpoint_every // every, "evenly"
    posterior.probs(QUERIES, ALPHA_BAR, NULL)
    assert len(made) == checkpoint_every // every + 1, "the first step after a checkpoint makes it anew"
