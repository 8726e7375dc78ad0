"""Agreement of halves by hand, and where curves cross."""

import pytest
import torch

from provgen.studies.memorization.curves import crossing, halves_agreement


def test_equal_images_agree_and_unrelated_ones_do_not():
    generator = torch.Generator().manual_seed(0)
    images, others = (torch.randn(400, 20, generator=generator) for _ in range(2))
    labels = torch.arange(400) % 4
    assert halves_agreement(images, images, labels).value == 1
    found = halves_agreement(images, others, labels)
    assert found.low < 0 < found.high
    assert found.value == pytest.approx(0, abs=0.03)


def test_agreement_by_hand():
    first, second = torch.tensor([[0.0], [10.0], [3.0]]), torch.tensor([[1.0], [10.0], [7.0]])
    # Distances of the same noise 1, 0, 4; within class 0, of different noises: 10 and 9. The third is alone.
    found = halves_agreement(first, second, torch.tensor([0, 0, 1]))
    assert found.value == pytest.approx(1 - (1 + 0 + 4) / 3 / 9.5)


def test_crossings_are_interpolated_in_the_logarithm():
    assert crossing([16, 64, 256], [1.0, 0.75, 0.25], 0.5) == pytest.approx(128)
    assert crossing([16, 64, 256], [0.0, 0.0, 1.0], 0.25) == pytest.approx(64 * 4**0.25)
    assert crossing([16, 64], [1.0, 0.9], 0.5) is None
    assert crossing([16, 64, 256], [1.0, 0.5, 0.0], 0.5) == pytest.approx(64)
    assert crossing([16, 64], [1.0, 0.5], 0.5) == pytest.approx(64)
    assert crossing([16, 64, 256], [1.0, 0.2, 0.9], 0.5) == pytest.approx(16 * 4 ** (5 / 8)), "the first"
