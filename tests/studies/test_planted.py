"""Planted sources: the ideal tracer reaches the Bayes accuracy and no other exceeds it; copies are one source."""

import pytest
import torch

from provgen.studies.faithfulness.planted import bayes_hits, plant, precision_at, reliability, source_groups

COUNT = 4000


@pytest.fixture(scope="module")
def images():
    return torch.randn(30, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def kernel(planted, images, bandwidth):
    squares = torch.cdist(planted.images.flatten(1), images.flatten(1)).square()
    return (-squares / (2 * bandwidth**2)).softmax(dim=1)


def test_two_images_by_hand():
    """Images 0 and d apart in one direction: the best guess is right with probability Phi(d / 2s)."""
    images = torch.zeros(2, 1, 2, 2, dtype=torch.float64)
    images[1, 0, 0, 0] = 1.5
    planted = plant(images, COUNT, bandwidth=0.6, seed=1)
    groups = source_groups(images)
    hits, sure = bayes_hits(planted, images, groups, 1)
    expected = float(torch.special.ndtr(torch.tensor(1.5 / 1.2)))
    assert float(hits.double().mean()) == pytest.approx(expected, abs=0.02)
    assert float(sure.mean()) == pytest.approx(expected, abs=0.01)
    assert int(planted.parents.sum()) == pytest.approx(COUNT / 2, abs=5 * COUNT**0.5 / 2)


def test_the_noise_is_as_wide_as_is_said(images):
    planted = plant(images, COUNT, bandwidth=0.3, seed=2)
    noise = planted.images - images[planted.parents]
    assert float(noise.std()) == pytest.approx(0.3, rel=0.02)
    assert torch.equal(plant(images, COUNT, bandwidth=0.3, seed=2).images, planted.images)


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("bandwidth", [0.2, 1.0])
def test_the_ideal_tracer_reaches_the_bayes_accuracy_and_a_worse_one_does_not(images, bandwidth, k):
    planted = plant(images, COUNT, bandwidth=bandwidth, seed=3)
    groups = source_groups(images)
    hits, sure = bayes_hits(planted, images, groups, k)
    best = precision_at(kernel(planted, images, bandwidth), planted.parents, groups, k)
    assert best.value == pytest.approx(float(hits.double().mean()))
    assert best.value == pytest.approx(float(sure.mean()), abs=0.03)
    ranked = torch.nn.functional.cosine_similarity(planted.images.flatten(1)[:, None], images.flatten(1)[None], dim=2)
    other = precision_at(ranked, planted.parents, groups, k)
    assert other.high < best.value + 1e-9 or bandwidth < 0.5
    assert precision_at(kernel(planted, images, bandwidth), planted.parents, groups, 30).value == 1


def test_copies_are_one_source(images):
    doubled = torch.cat([images, images[:10]])
    groups = source_groups(doubled)
    assert groups[:10].tolist() == groups[30:].tolist()
    assert len(groups.unique()) == 30
    planted = plant(doubled, 500, bandwidth=0.01, seed=4)
    scores = kernel(planted, doubled, 0.01)
    assert precision_at(scores, planted.parents, groups, 1).value == 1
    alone = precision_at(scores, planted.parents, torch.arange(40), 1).value
    assert alone < 0.9, "which of two copies it was, nobody can say"
    assert bayes_hits(planted, doubled, groups, 1)[0].all()


def test_k_counts_sources_and_not_copies():
    scores = torch.tensor([[0.5, 0.4, 0.3]])
    groups = torch.tensor([0, 0, 1])
    assert precision_at(scores, torch.tensor([2]), groups, 1).value == 0
    assert precision_at(scores, torch.tensor([2]), groups, 2).value == 1
    assert precision_at(scores, torch.tensor([2]), torch.arange(3), 2).value == 0


def test_the_exact_posterior_is_reliable_and_a_sharper_one_boasts(images):
    planted = plant(images, COUNT, bandwidth=1.0, seed=5)
    groups, edges = source_groups(images), torch.linspace(0, 1, 6)
    for belief, right in reliability(kernel(planted, images, 1.0), planted.parents, groups, edges):
        assert right.low - 0.02 < belief.value < right.high + 0.02
    boasting = reliability(kernel(planted, images, 0.4), planted.parents, groups, edges)
    assert boasting[-1][0].value > boasting[-1][1].high + 0.1
    assert sum(right.n for _, right in boasting) == COUNT
