"""Distances, precision and recall beside torch-fidelity; Vendi score and coverage by hand; intervals that cover."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_full

from provgen.errors import InputError
from provgen.metrics.set_measures import (
    effective_number,
    frechet_distance,
    kernel_distance,
    precision_recall,
    vendi_score,
    with_interval,
)


@pytest.fixture
def sets(generator):
    mixing = torch.randn(12, 12, generator=generator)
    return torch.randn(400, 12, generator=generator) @ mixing, 1 + 2 * torch.randn(300, 12, generator=generator)


def test_a_shift_is_its_squared_length(generator):
    rows, shift = torch.randn(50, 6, generator=generator), torch.tensor([1.0, 2, 3, 0, 0, -1])
    assert frechet_distance(rows, rows + shift) == pytest.approx(15)
    assert frechet_distance(rows, rows) == pytest.approx(0, abs=1e-9)


def test_scaled_sets_by_hand(generator):
    rows = torch.randn(500, 4, generator=generator, dtype=torch.float64)
    whitened = torch.linalg.qr(rows - rows.mean(0)).Q * 499**0.5
    assert frechet_distance(2 * whitened, 5 * whitened) == pytest.approx(4 * (5 - 2) ** 2)


def test_frechet_distance_is_that_of_torch_fidelity(sets):
    statistics = [fid_features_to_statistics(rows.double()) for rows in sets]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(*sets) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(*reversed(sets)) == pytest.approx(expected, rel=1e-6)


def test_fewer_images_than_features(generator):
    few, others = torch.randn(10, 40, generator=generator), torch.randn(70, 40, generator=generator)
    first, second = (torch.cov(rows.double().T) for rows in (few, others))
    values = torch.linalg.eigvals(first @ second).real.clamp_min(0).sqrt().sum()
    expected = (few.mean(0) - others.mean(0)).double().square().sum() + first.trace() + second.trace() - 2 * values
    assert frechet_distance(few, others) == pytest.approx(float(expected), rel=1e-5)


def test_kernel_distance_is_that_of_torch_fidelity(sets):
    expected = kid_features_to_metric(
        *(rows.double() for rows in sets), kid_subsets=1, kid_subset_size=300, verbose=False, rng_seed=0
    )["kernel_inception_distance_mean"]
    # With one subset of all 300 images of either; ours takes all 400 of the first set, so cut it to its own choice.
    first = sets[0][torch.from_numpy(np.random.RandomState(0).choice(400, 300, replace=False))]
    assert kernel_distance(first, sets[1]) == pytest.approx(expected, rel=1e-6)


def test_kernel_distance_of_a_set_from_itself_is_negative(generator):
    """By hand: without bias the sums inside a set leave the diagonal out, that between the sets does not."""
    rows = torch.randn(50, 8, generator=generator).double()
    products = (rows @ rows.T / 8 + 1) ** 3
    inside = (products.sum() - products.diagonal().sum()) / (50 * 49)
    expected = float(2 * inside - 2 * products.mean())
    assert kernel_distance(rows, rows) == pytest.approx(expected, rel=1e-9)
    assert expected < 0


def test_kernel_distance_is_unbiased(generator):
    values = [kernel_distance(*(torch.randn(60, 5, generator=generator) for _ in range(2))) for _ in range(100)]
    assert abs(np.mean(values)) < 3.5 * np.std(values) / 10
    assert min(values) < 0, "of two sets that are alike it may be below 0"


def test_vendi_of_copies_and_of_orthogonal_images():
    assert vendi_score(torch.ones(7, 3)) == pytest.approx(1)
    assert vendi_score(torch.eye(5)) == pytest.approx(5)
    assert vendi_score(torch.eye(5).repeat(4, 1)) == pytest.approx(5)


def test_effective_number_by_hand():
    points = torch.tensor([0.0, 0, 10, 10, 20, 20], dtype=torch.float64)
    kernel = (-(points[:, None] - points).abs()).exp()
    assert effective_number(kernel / 6) == pytest.approx(2.9999999959, abs=1e-9)
    kernel = torch.tensor([[1, 0.9, 0], [0.9, 1, 0], [0, 0, 1]], dtype=torch.float64)
    assert effective_number(kernel / 3) == pytest.approx(2.1573004834, abs=1e-9)


def test_intervals_cover_and_shrink(generator):
    def mean(rows):
        return float(rows.mean())

    found = [with_interval(mean, torch.randn(100, 1, generator=generator)) for _ in range(200)]
    assert np.mean([e.low < 0 < e.high for e in found]) == pytest.approx(0.95, abs=0.05)
    width = np.mean([e.high - e.low for e in found])
    assert width == pytest.approx(2 * 2.2 * 0.1, rel=0.15), "of Student's t with 9 degrees of freedom"


def test_an_interval_of_few_images_is_refused():
    with pytest.raises(InputError, match="needs 20 images of each kind, got 3"):
        with_interval(frechet_distance, torch.zeros(50, 2), torch.zeros(3, 2))


def values_of(found):
    return tuple(estimate.value for estimate in found)


def test_a_case_by_hand():
    reference, generated = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.5], [10.0]])
    assert values_of(precision_recall(generated, reference, k=1)) == pytest.approx((1 / 2, 1, 1, 2 / 3))


@pytest.mark.parametrize("offset", [0, 1e3])
def test_a_set_is_like_itself(offset):
    rows = offset + torch.randn(60, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert values_of(precision_recall(rows, rows, k=3)) == pytest.approx((1, 1, 1, 1))


def test_equal_points_are_inside_each_other():
    assert values_of(precision_recall(torch.ones(8, 2), torch.ones(9, 2), k=2)) == pytest.approx((1, 1, 9 / 2, 1))


def test_torch_fidelity_says_the_same():
    generator = torch.Generator().manual_seed(42)
    generated, real = (scale * torch.randn(200, 16, generator=generator) for scale in (0.1, 3))
    for first, second in ((generated, real), (real[:90], real[60:] + 1)):
        expected = calculate_precision_recall_full(first.double(), second.double(), 3)
        assert values_of(precision_recall(first, second, k=3))[:2] == pytest.approx([float(v) for v in expected[:2]])
    narrow = precision_recall(generated, real, k=3)
    assert narrow.precision.value > 0.8
    assert narrow.recall.value < 0.3


@pytest.mark.parametrize(
    ("n", "m", "k", "expected"),
    [(10_000, 10_000, 5, 0.968773), (300, 300, 3, 0.8763), (200, 400, 5, 0.9961)],
)
def test_expected_coverage(n, m, k, expected, expected_coverage):
    assert expected_coverage(m, n, k) == pytest.approx(expected, abs=5e-5)


def test_sets_that_are_alike_have_the_expected_coverage_and_density_one(expected_coverage):
    generator = torch.Generator().manual_seed(1)
    coverages, densities = [], []
    for _ in range(30):
        sets = [torch.randn(300, 8, generator=generator) for _ in range(2)]
        found = precision_recall(*sets, k=3)
        coverages.append(found.coverage.value)
        densities.append(found.density.value)
    assert sum(coverages) / 30 == pytest.approx(expected_coverage(300, 300, 3), abs=0.012)
    assert sum(densities) / 30 == pytest.approx(1, abs=0.06)


@pytest.mark.slow
def test_ten_thousand_images_of_a_thousand_features():
    """The example that the authors of density and coverage publish.

    In so many dimensions a few images are near to many, so that density differs from draw to draw.
    """
    generator = torch.Generator().manual_seed(0)
    found = precision_recall(*(torch.randn(10_000, 1000, generator=generator) for _ in range(2)))
    precision, recall, density, coverage = values_of(found)
    assert (precision, recall, coverage) == pytest.approx((0.4772, 0.4705, 0.9735), abs=0.02)
    assert density == pytest.approx(1.0555, abs=0.15)


def test_chunks_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(2)
    sets = [torch.randn(70, 4, generator=generator), torch.randn(50, 4, generator=generator)]
    whole = precision_recall(*sets)
    monkeypatch.setattr("provgen.metrics.set_measures.CHUNK", 13)
    assert precision_recall(*sets) == whole


def test_too_few_images_are_refused():
    with pytest.raises(InputError, match="more than 5 images, got 5 and 9"):
        precision_recall(torch.zeros(5, 2), torch.zeros(9, 2))
