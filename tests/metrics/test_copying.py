"""Copying: ratios against their exact null and copies, authenticity against its null, C_T at its exact extremes."""

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import make_moons

from provgen.errors import InputError
from provgen.metrics.copying import (
    MEMORIZED,
    Placed,
    SpaceCells,
    authenticity,
    calibrated_distance,
    closer_to_train,
    copying_statistic,
    counted_cells,
    data_copying,
    distance_ratio,
    rank_sum_score,
    share_memorized,
)
from provgen.metrics.neighbors import distinct_rows, nearest


def ratios_of(queries, train):
    return distance_ratio(nearest(queries, distinct_rows(train), 2))


@pytest.fixture
def points(generator):
    return torch.randn(70, 5, generator=generator), torch.randn(200, 5, generator=generator)


def test_exact_copies_are_all_memorized(points):
    _, train = points
    ratios = ratios_of(train, train)
    assert torch.equal(ratios, torch.zeros(200, dtype=torch.float64))
    estimate = share_memorized(ratios)
    assert (estimate.value, estimate.high, estimate.n) == (1.0, 1.0, 200)


def test_copies_of_an_image_that_is_there_twice_are_memorized(points):
    _, train = points
    doubled = torch.cat([train, train, train[:3]])
    assert share_memorized(ratios_of(train + 1e-6, doubled)).value == 1
    torch.testing.assert_close(ratios_of(train + 0.1, doubled), ratios_of(train + 0.1, train))


def test_distance_ratio_of_a_worked_example():
    train = torch.tensor([[0.0, 0.0], [0.0, 0.0], [4.0, 0.0]])
    queries = torch.tensor([[1.0, 0.0], [2.0, 0.0], [4.0, 3.0], [-4.0, 0.0]])
    expected = torch.tensor([1 / 3, 1.0, 3 / 5, 1 / 2], dtype=torch.float64)
    torch.testing.assert_close(ratios_of(queries, train), expected)


def test_the_threshold_itself_is_not_memorized():
    ratios = torch.tensor([0.25, MEMORIZED, 0.75], dtype=torch.float64)
    assert share_memorized(ratios).value == pytest.approx(1 / 3)


@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_independent_points_fall_below_a_threshold_with_its_power_of_the_dimension(dimension, generator):
    # Locally uniform: queries well inside a cube of uniform training points, so that no border is felt,
    # and far fewer than these, so that few share a neighbour and the error is nearly binomial.
    train = torch.rand(12_000, dimension, generator=generator)
    queries = 0.25 + 0.5 * torch.rand(1000, dimension, generator=generator)
    ratios = ratios_of(queries, train)
    for threshold in (1 / 3, 1 / 2, 4 / 5):
        null = threshold**dimension
        standard_error = (null * (1 - null) / len(queries)) ** 0.5
        assert float((ratios < threshold).double().mean()) == pytest.approx(null, abs=4 * standard_error)
    assert share_memorized(ratios).value == pytest.approx(float((ratios < 1 / 3).double().mean()))


def test_permuting_train_keeps_the_ratios(points, generator):
    queries, train = points
    order = torch.randperm(len(train), generator=generator)
    assert torch.equal(ratios_of(queries, train[order]), ratios_of(queries, train))


def test_one_distinct_training_image_is_refused():
    with pytest.raises(InputError, match="2 distinct ones, got 1"):
        ratios_of(torch.ones(1, 4), torch.zeros(5, 4))
    with pytest.raises(InputError, match="0 observations"):
        share_memorized(torch.empty(0))


def test_a_copy_has_no_calibrated_distance_and_equal_distances_have_two():
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    assert calibrated_distance(nearest(torch.zeros(1, 3), corners, 8)).tolist() == pytest.approx([2])
    assert calibrated_distance(nearest(corners, corners, 8)).tolist() == [0] * 8
    assert calibrated_distance(nearest(torch.ones(2, 3), torch.ones(5, 3), 5)).tolist() == [0, 0]


@pytest.mark.parametrize("copies", [1, 3, 5])
def test_a_near_copy_of_what_is_there_often_stands_out_less(copies):
    # 5 nearest: `copies` at distance 1, the others at 3.
    train = torch.cat([torch.tensor([[1.0]]).expand(copies, 1), torch.tensor([[-3.0]]).expand(6, 1)])
    expected = 2 * 1 / ((copies + 3 * (5 - copies)) / 5)
    assert calibrated_distance(nearest(torch.zeros(1, 1), train, 5)).tolist() == pytest.approx([expected])


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


@pytest.mark.slow
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


@pytest.fixture
def few_resamples(monkeypatch):
    """For tests that look at values and not at intervals."""
    monkeypatch.setattr("provgen.metrics.copying.RESAMPLES", 5)


def copying_of(generated, holdout, train):
    cells_of = SpaceCells(train, seed=0)
    placed = [Placed(nearest(rows, train, 1).distances[:, 0], cells_of(rows)) for rows in (generated, holdout)]
    return data_copying(*placed, seed=0)


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
@pytest.mark.usefixtures("few_resamples")
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
        found = data_copying(*placed, seed=0)
        assert found.null_deviation == pytest.approx(2**-0.5, abs=0.02)
        values.append(found.statistic.value)
    assert np.mean(values) == pytest.approx(expected, abs=1.5)


@pytest.mark.usefixtures("few_resamples")
def test_kernel_densities_of_two_moons(monkeypatch):
    """As published: copying, right at the bandwidth of maximum likelihood, too wide (Meehan et al. 2020)."""
    monkeypatch.setattr("provgen.metrics.copying.NUM_CELLS", 5)
    points = [torch.from_numpy(make_moons(n, noise=0.2, random_state=n)[0]).float() for n in (2000, 1000)]
    train, holdout = points
    scores = {}
    for bandwidth in (1e-3, 1e-2, 0.03, 0.09, 0.27, 10):
        generated = kernel_density(train, 1000, bandwidth, torch.Generator().manual_seed(0))
        scores[bandwidth] = copying_of(generated, holdout, train).statistic.value
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


@pytest.mark.usefixtures("few_resamples")
def test_the_null_has_its_deviation():
    values = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        sets = [torch.randn(count, 3, generator=generator) for count in (150, 150, 400)]
        found = copying_of(*sets)
        values.append(found.statistic.value / found.null_deviation)
    assert abs(np.mean(values)) < 3.5 / 40**0.5
    assert 0.7 < np.std(values) < 1.35


@pytest.mark.usefixtures("few_resamples")
def test_many_features_are_reduced_first():
    generator = torch.Generator().manual_seed(0)
    train, holdout = (torch.randn(300, 100, generator=generator) for _ in range(2))
    assert copying_of(train[:100], holdout, train).statistic.value < -8


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize("n", [20, 30, 45])
def test_few_images_are_one_cell(n):
    generator = torch.Generator().manual_seed(n)
    generated, holdout, train = (torch.randn(count, 16, generator=generator) for count in (n, n, 200))
    found = copying_of(generated, holdout, train)
    assert abs(found.statistic.value) < 3.5
    assert found.null_deviation <= 1
    assert copying_of(train[:n], holdout, train).statistic.value < -4
