"""Intervals against published values, coverage by simulation, and the normal limit."""

import math

import pytest
import torch
from scipy.stats import beta

from provgen.errors import InputError
from provgen.metrics.statistics import Estimate, auroc, mean_estimate, proportion, stratified_auroc


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(0, 10, 0.0, 0.3085), (5, 10, 0.1871, 0.8129), (10, 10, 0.6915, 1.0), (1, 1, 0.025, 1.0)],
)
def test_proportion_gives_the_published_clopper_pearson_interval(successes, n, low, high):
    estimate = proportion(successes, n)
    assert estimate.value == successes / n
    assert estimate.low == pytest.approx(low, abs=5e-5)
    assert estimate.high == pytest.approx(high, abs=5e-5)
    assert estimate.n == n


def test_proportion_agrees_with_beta_quantiles():
    estimate = proportion(7, 40)
    assert estimate.low == pytest.approx(beta.ppf(0.025, 7, 34), abs=1e-10)
    assert estimate.high == pytest.approx(beta.ppf(0.975, 8, 33), abs=1e-10)


def test_no_observations_are_refused():
    with pytest.raises(InputError, match="0 observations"):
        proportion(0, 0)
    with pytest.raises(InputError, match="0 observations"):
        mean_estimate(torch.empty(0), seed=0)


def test_mean_of_one_value_has_no_width():
    assert mean_estimate(torch.tensor([2.5]), seed=3) == Estimate(2.5, 2.5, 2.5, 1)


def test_mean_interval_approaches_the_normal_one():
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 3 + 1
    estimate = mean_estimate(values, seed=0)
    margin = 1.96 * float(values.std()) / math.sqrt(len(values))
    assert estimate.value == pytest.approx(float(values.double().mean()), abs=1e-12)
    assert estimate.high - estimate.value == pytest.approx(margin, rel=0.1)
    assert estimate.value - estimate.low == pytest.approx(margin, rel=0.1)


def test_mean_interval_covers_the_truth_about_as_often_as_it_says():
    draws = torch.rand(200, 30, generator=torch.Generator().manual_seed(1))
    estimates = [mean_estimate(row, seed=0) for row in draws]
    covered = sum(estimate.low <= 0.5 <= estimate.high for estimate in estimates)
    assert 0.88 <= covered / len(draws) <= 0.98


def test_mean_interval_depends_on_its_seed_and_on_nothing_else():
    values = torch.arange(20.0)
    torch.manual_seed(0)
    first = mean_estimate(values, seed=5)
    torch.manual_seed(1)
    assert mean_estimate(values, seed=5) == first
    assert mean_estimate(values, seed=6) != first


def test_bounded_memory_keeps_the_number_of_resamples():
    values = torch.zeros(50_000).index_fill(0, torch.arange(25_000), 1.0)
    estimate = mean_estimate(values, seed=0)
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(50_000), rel=0.25)


def test_auroc_by_hand():
    found = auroc(torch.tensor([3.0, 1.0]), torch.tensor([0.0, 1.0, 2.0, 4.0]), seed=0)
    assert found.value == pytest.approx((3 + 1.5) / 8)
    assert found.low <= found.value <= found.high
    assert found.n == 2
    assert auroc(torch.ones(5), torch.ones(7), seed=0).value == 0.5
    assert auroc(torch.ones(5), torch.zeros(7), seed=0).low == 1


@pytest.mark.parametrize(("shift", "expected"), [(0.0, 0.5), (1.0, 0.760250), (2.0, 0.921350)])
def test_auroc_of_shifted_gaussians(shift, expected):
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randn(20_000, generator=generator) + mean for mean in (shift, 0)]
    found = auroc(*sides, seed=0, resamples=100)
    assert found.value == pytest.approx(expected, abs=0.008)
    assert found.high - found.low < 0.015


def test_auroc_of_nothing_is_refused():
    with pytest.raises(InputError, match="got 0 and 3"):
        auroc(torch.empty(0), torch.ones(3), seed=0)


def test_strata_are_compared_within_themselves():
    # In each stratum nothing tells; pooled, the stratum of all positives would.
    scores = torch.tensor([5.0, 5, 5, 5, 1, 1, 1, 1])
    positive = torch.tensor([True, True, True, False, True, False, False, False])
    strata = torch.tensor([0] * 4 + [1] * 4)
    assert auroc(scores[positive], scores[~positive], seed=0).value == pytest.approx(0.75)
    found = stratified_auroc(scores, positive, strata, resamples=1000)
    assert (found.value, found.n) == (0.5, 2)
    # Stratum 0: 3 pairs of which 2 are right; stratum 1: 3 pairs, all right.
    scores = torch.tensor([7.0, 6, 1, 5, 3, 2, 1, 0])
    assert stratified_auroc(scores, positive, strata, resamples=1000).value == pytest.approx(5 / 6)
    assert stratified_auroc(scores, strata == 0, strata, resamples=1000) is None


def test_columns_carry_the_ends_beside_the_value():
    estimate = Estimate(0.5, 0.25, 0.75, 9)
    assert estimate.columns("top1") == {"top1": 0.5, "top1_low": 0.25, "top1_high": 0.75}
    assert list(estimate.columns("over random", " ")) == ["over random", "over random low", "over random high"]
