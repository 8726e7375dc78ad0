"""Authenticity against its exact null on a torus; nearer to training than to held-out images."""

import math

import pytest
import torch

from provgen.metrics.copying import authenticity, closer_to_train
from provgen.metrics.neighbors import distinct_rows, nearest


def authenticity_of(generated, train):
    distinct = distinct_rows(train)
    return authenticity(nearest(generated, distinct, 1), distinct)


def closer_of(generated, holdout, train):
    return closer_to_train(nearest(generated, train, 1), generated, holdout)


def test_copies_are_not_authentic_and_far_images_are(generator):
    train = torch.randn(100, 4, generator=generator)
    assert authenticity_of(train[:30], train).value == 0
    assert authenticity_of(train[:30] + 100, train).value == 1


def test_copies_of_what_is_there_twice_are_not_authentic(generator):
    train = torch.randn(50, 4, generator=generator)
    assert authenticity_of(train + 1e-4, torch.cat([train, train])).value == 0


@pytest.mark.parametrize(
    ("dimension", "expected"),
    [(1, 1 / 3), (2, 1 - 6 * math.pi / (8 * math.pi + 3 * math.sqrt(3))), (3, 1 - 16 / 27)],
)
def test_the_null_of_locally_uniform_images(dimension, expected, generator):
    # Well inside a cube of uniform training points, so that no border is felt.
    train = torch.rand(10_000, dimension, generator=generator)
    generated = 0.25 + 0.5 * torch.rand(10_000, dimension, generator=generator)
    found = authenticity_of(generated, train)
    assert found.value == pytest.approx(expected, abs=0.02)
    assert found.low < found.value < found.high


@pytest.mark.parametrize(("dimension", "expected"), [(2, 0.375), (8, 0.59), (32, 0.76)])
def test_the_null_of_independent_gaussians(dimension, expected, generator):
    train, generated = (torch.randn(2000, dimension, generator=generator) for _ in range(2))
    assert authenticity_of(generated, train).value == pytest.approx(expected, abs=0.03)


def test_nearer_to_training_images(generator):
    train, holdout = torch.randn(90, 5, generator=generator), torch.randn(30, 5, generator=generator)
    assert closer_of(train, holdout, train).value == 1
    assert closer_of(holdout, holdout, train).value == 0
    alike = torch.randn(2000, 5, generator=generator)
    others = [torch.randn(count, 5, generator=generator) for count in (1000, 3000)]
    assert closer_of(alike, *others).value == pytest.approx(3 / 4, abs=0.04), "the share of training images"


def test_ties_count_half():
    assert closer_of(torch.zeros(10, 1), torch.ones(3, 1), -torch.ones(3, 1)).value == 0.5
