"""Scores at their exact extremes, the null deviation by hand, and Gaussians from copying to too wide."""

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import make_moons

from provgen.metrics.copying import (
    Placed,
    SpaceCells,
    copying_statistic,
    counted_cells,
    data_copying,
    rank_sum_score,
)
from provgen.metrics.neighbors import nearest


def copying_of(generated, holdout, train, **options):
    cells_of = SpaceCells(train, seed=0, num_cells=options.pop("num_cells", 3))
    placed = [Placed(nearest(rows, train, 1).distances[:, 0], cells_of(rows)) for rows in (generated, holdout)]
    return data_copying(*placed, seed=0, **options)


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (10, -3.7418482828),
        (50, -8.6138279344),
        (100, -12.2157227412),
        (200, -17.2984654777),
        (1000, -38.7201159130),
    ],
)
def test_all_generated_images_nearer(n, expected):
    assert rank_sum_score(np.zeros(n), np.ones(n)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("n", "expected"), [(10, 3.8174411774), (100, 12.2181661301)])
def test_all_generated_images_farther(n, expected):
    assert rank_sum_score(np.ones(n), np.zeros(n)) == pytest.approx(expected, abs=1e-9)


def test_ties_and_a_hand_worked_case():
    assert rank_sum_score(np.zeros(100), np.zeros(100)) == pytest.approx(0.0012216944, abs=1e-9)
    score = rank_sum_score(np.array([1.0, 2, 4]), np.array([3.0, 5, 6, 7]))
    assert score == pytest.approx(-1.5909902577, abs=1e-9)


def test_cells_are_weighed_by_their_held_out_images():
    # Cell 0 has 30 held-out images that are all farther, cell 1 has 10 that are all nearer, cell 2 too few generated.
    generated = np.concatenate([np.zeros(20), np.full(25, 2.0), np.zeros(19)])
    sides = (
        Placed(torch.from_numpy(generated), torch.tensor([0] * 20 + [1] * 25 + [2] * 19)),
        Placed(torch.ones(100), torch.tensor([0] * 30 + [1] * 10 + [2] * 60)),
    )
    first, second = rank_sum_score(np.zeros(20), np.ones(30)), rank_sum_score(np.full(25, 2.0), np.ones(10))
    value, deviation = copying_statistic(counted_cells(*sides))
    assert value == pytest.approx((0.3 * first + 0.1 * second) / 0.4)
    assert deviation == pytest.approx(math.hypot(0.3, 0.1) / 0.4)


def test_three_equal_cells_have_a_deviation_of_0577():
    assert copying_statistic([(np.zeros(40), np.zeros(40))] * 3)[1] == pytest.approx(3**-0.5)


def test_all_generated_in_a_cell_of_few_held_out_images():
    """A collapsed generator: resamples never lose the only cell."""
    generated = Placed(torch.rand(40, dtype=torch.float64), torch.zeros(40).long())
    holdout = Placed(torch.rand(64, dtype=torch.float64), torch.tensor([0] + [1] * 63))
    found = data_copying(generated, holdout, seed=0)
    assert found.statistic.low <= found.statistic.value <= found.statistic.high


def kernel_density(train, count, bandwidth, generator):
    parents = torch.randint(len(train), (count,), generator=generator)
    return train[parents] + bandwidth * torch.randn(count, 2, generator=generator)


@pytest.mark.parametrize(
    ("bandwidth", "expected"),
    [
        (0.001, -27.3),
        (0.01, -22.6),
        (0.03, -10.3),
        (0.1, -1.2),
        (0.2, -0.2),
        (0.3, -0.2),
        (0.5, 2.6),
        (1, 7.5),
        (10, 26.6),
    ],
)
def test_kernel_densities_of_a_gaussian_in_two_halves(bandwidth, expected):
    """The published values are one draw; so are the two of each mean here, and a score has a deviation of 0.7."""
    values = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        train, holdout = (torch.randn(count, 2, generator=generator) for count in (2000, 1000))
        generated = kernel_density(train, 1000, bandwidth, generator)
        placed = [
            Placed(nearest(rows, train, 1).distances[:, 0], (rows[:, 0] > 0).long()) for rows in (generated, holdout)
        ]
        found = data_copying(*placed, seed=0, resamples=20)
        assert found.null_deviation == pytest.approx(2**-0.5, abs=0.02)
        values.append(found.statistic.value)
    assert np.mean(values) == pytest.approx(expected, abs=1.5)


def test_kernel_densities_of_two_moons():
    """As published: copying, right at the bandwidth of maximum likelihood, too wide (Meehan et al. 2020)."""
    points = [torch.from_numpy(make_moons(n, noise=0.2, random_state=n)[0]).float() for n in (2000, 1000)]
    train, holdout = points
    scores = {}
    for bandwidth in (1e-3, 1e-2, 0.03, 0.09, 0.27, 10):
        generated = kernel_density(train, 1000, bandwidth, torch.Generator().manual_seed(0))
        scores[bandwidth] = copying_of(generated, holdout, train, num_cells=5, resamples=20).statistic.value
    assert list(scores.values()) == sorted(scores.values())
    assert scores[1e-3] == pytest.approx(-17.4, abs=1.5)
    assert scores[1e-2] == pytest.approx(-11, abs=1.5)
    assert scores[10] == pytest.approx(16, abs=1.5)
    assert scores[0.03] < -1.5 < scores[0.09] < 1.5 < scores[0.27], "crosses 0 at about 0.09"
    squares = torch.cdist(holdout, train).square()
    likelihood = {
        s: float((-squares / (2 * s**2)).logsumexp(dim=1).mean()) - 2 * math.log(s)
        for s in (0.03, 0.06, 0.09, 0.13, 0.27)
    }
    assert max(likelihood, key=likelihood.get) in (0.06, 0.09, 0.13)


def test_the_null_has_its_deviation():
    values = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        sets = [torch.randn(count, 3, generator=generator) for count in (150, 150, 400)]
        found = copying_of(*sets, resamples=2)
        values.append(found.statistic.value / found.null_deviation)
    assert abs(np.mean(values)) < 3.5 / 40**0.5
    assert 0.7 < np.std(values) < 1.35


def test_many_features_are_reduced_first():
    generator = torch.Generator().manual_seed(0)
    train, holdout = (torch.randn(300, 100, generator=generator) for _ in range(2))
    assert copying_of(train[:100], holdout, train, resamples=5).statistic.value < -8


@pytest.mark.parametrize("n", [20, 30, 45])
def test_few_images_are_one_cell(n):
    generator = torch.Generator().manual_seed(n)
    generated, holdout, train = (torch.randn(count, 16, generator=generator) for count in (n, n, 200))
    found = copying_of(generated, holdout, train, resamples=100)
    assert abs(found.statistic.value) < 3.5
    assert found.null_deviation <= 1
    assert copying_of(train[:n], holdout, train, resamples=10).statistic.value < -4
