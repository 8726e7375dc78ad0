"""Planted classes are found at the rate that the Bayes rule allows, and nothing is read out of noise."""

import math

import pytest
import torch

from provgen.errors import InputError
from provgen.metrics.linear_probe import MAX_DIMENSIONS, linear_probe


def two_classes(n, features, *, distance, seed):
    """Unit normal noise around two means that are `distance` apart along one feature."""
    noise = torch.randn(n, features, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(n) % 2
    noise[:, 0] += distance * labels
    return noise, labels


def test_separate_classes_are_told_apart():
    train, labels = two_classes(100, 4, distance=20, seed=0)
    test, answers = two_classes(60, 4, distance=20, seed=1)
    result = linear_probe(train, labels, test, answers, seed=0)
    assert result.accuracy.value == 1
    assert result.accuracy.low == pytest.approx(0.025 ** (1 / 60), abs=1e-9)
    assert result.baseline == 0.5


def test_overlapping_classes_are_told_apart_as_often_as_the_bayes_rule_does():
    train, labels = two_classes(2000, 10, distance=2, seed=0)
    test, answers = two_classes(2000, 10, distance=2, seed=1)
    by_bayes = ((test[:, 0] > 1) == answers.bool()).double().mean()
    result = linear_probe(train, labels, test, answers, seed=0)
    assert result.accuracy.value == pytest.approx(float(by_bayes), abs=0.02)


def test_more_than_two_classes_are_one_multinomial_problem():
    labels = torch.arange(300) % 3
    angles = labels * 2 * math.pi / 3
    noise = 0.2 * torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    points = torch.stack([angles.cos(), angles.sin()], dim=1) + noise
    assert linear_probe(points[:200], labels[:200], points[200:], labels[200:], seed=0).accuracy.value > 0.98


def test_noise_holds_no_class():
    random = torch.Generator().manual_seed(0)
    train, test = (torch.randn(400, 30, generator=random) for _ in range(2))
    labels, answers = (torch.randint(4, (400,), generator=random) for _ in range(2))
    result = linear_probe(train, labels, test, answers, seed=0)
    assert result.accuracy.low < 0.25 < result.accuracy.high
    assert result.baseline == int(answers.bincount().max()) / 400


def test_units_and_offsets_of_the_features_do_not_matter():
    train, labels = two_classes(200, 6, distance=2, seed=0)
    test, answers = two_classes(200, 6, distance=2, seed=1)
    units, offset = torch.logspace(-4, 4, 6), torch.arange(6.0)
    result = linear_probe(train, labels, test, answers, seed=0)
    moved = linear_probe(train.double() * units + offset, labels, test.double() * units + offset, answers, seed=0)
    assert moved.accuracy.value == pytest.approx(result.accuracy.value, abs=0.005)


def test_wide_features_lose_no_class_that_their_variance_holds():
    """A random rotation into more dimensions than are kept; one feature is constant."""
    random = torch.Generator().manual_seed(0)
    train, labels = two_classes(300, 8, distance=20, seed=0)
    test, answers = two_classes(300, 8, distance=20, seed=1)
    rotation = torch.randn(8, 2 * MAX_DIMENSIONS, generator=random)
    rotation[:, -1] = 0
    result = linear_probe(train @ rotation, labels, test @ rotation, answers, seed=0)
    assert result.accuracy.value == 1


def test_the_test_part_decides_nothing():
    train, labels = two_classes(200, 300, distance=2, seed=0)
    test, answers = two_classes(100, 300, distance=2, seed=1)
    whole = linear_probe(train, labels, test, answers, seed=0)
    parts = [
        linear_probe(train, labels, test[some] * scale, answers[some], seed=0)
        for some, scale in ((slice(50), 1), (slice(50, 100), 1), (slice(100), 100))
    ]
    assert {part.inverse_regularisation for part in parts} == {whole.inverse_regularisation}
    assert (parts[0].accuracy.value + parts[1].accuracy.value) / 2 == pytest.approx(whole.accuracy.value)


def test_the_penalty_is_the_one_that_predicts_best_and_the_strongest_of_equals(monkeypatch):
    """So strong a penalty that the more frequent class is always predicted is not chosen."""
    points, labels = two_classes(400, 2, distance=8, seed=0)
    rare = ((labels == 0) | (torch.arange(400) < 100)).nonzero().flatten()
    monkeypatch.setattr("provgen.metrics.linear_probe.INVERSE_REGULARISATIONS", (1e-9, 1.0, 2.0))
    result = linear_probe(points[rare], labels[rare], points, labels, seed=0)
    assert result.accuracy.value > 0.98
    assert result.inverse_regularisation == 1.0
    monkeypatch.setattr("provgen.metrics.linear_probe.INVERSE_REGULARISATIONS", (1e-9,))
    assert linear_probe(points[rare], labels[rare], points, labels, seed=0).accuracy.value == 0.5


@pytest.mark.slow
def test_the_seed_decides_and_nothing_else():
    """Components of noise are in doubt, so that random ones show."""
    train, labels = two_classes(500, 600, distance=1, seed=0)
    test, answers = two_classes(500, 600, distance=1, seed=1)
    results = [linear_probe(train, labels, test, answers, seed=seed) for seed in (3, 3, 4)]
    assert results[0] == results[1] != results[2]
    narrow, few = train[:200, 1:31], labels[:200]
    chosen = [linear_probe(narrow, few, narrow, few, seed=seed).inverse_regularisation for seed in range(6)]
    assert len(set(chosen)) > 1, "the held-out fifth is drawn by the seed"


def test_the_fewest_images_are_two_of_two_classes():
    features = torch.tensor([[0.0], [0.1], [1.0], [1.1]])
    labels = torch.tensor([0, 0, 1, 1])
    for seed in range(6):
        assert linear_probe(features, labels, features, labels, seed=seed).accuracy.value == 1


@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 2, 3]])
def test_too_few_training_images_are_refused(labels):
    features = torch.arange(4.0)[:, None]
    with pytest.raises(InputError, match="two classes with two images each"):
        linear_probe(features, torch.tensor(labels), features, torch.tensor(labels), seed=0)


def test_no_test_images_are_refused():
    train, labels = two_classes(8, 2, distance=1, seed=0)
    with pytest.raises(InputError, match="0 test images"):
        linear_probe(train, labels, train[:0], labels[:0], seed=0)
