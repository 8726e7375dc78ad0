"""Precision, recall, density and coverage by hand, beside torch-fidelity, and in expectation."""

import pytest
import torch
from torch_fidelity.metric_prc import calculate_precision_recall_full

from provgen.errors import InputError
from provgen.metrics.distances import precision_recall


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
    monkeypatch.setattr("provgen.metrics.distances.CHUNK", 13)
    assert precision_recall(*sets) == whole


def test_too_few_images_are_refused():
    with pytest.raises(InputError, match="more than 5 images, got 5 and 9"):
        precision_recall(torch.zeros(5, 2), torch.zeros(9, 2))
