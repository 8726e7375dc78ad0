"""Entropies of noised training images against quadrature, bounds and planted near-copies."""

import math

import numpy as np
import pytest
import torch

from provgen.data.splits import entropy_coverage
from provgen.generators.closed_form import ODDS, ClosedFormPosterior, posterior_entropies, undecided_levels


def posterior_over(images) -> ClosedFormPosterior:
    """Each image a class of its own, which must not matter."""
    return ClosedFormPosterior(images, torch.arange(len(images)), null_label=len(images))


@pytest.fixture
def planted(generator):
    """Twelve images far apart, then two clusters of four near-copies."""
    spread = torch.rand(14, 1, 16, 16, generator=generator, dtype=torch.float64) * 2 - 1
    near = 0.02 * torch.randn(8, 1, 16, 16, generator=generator, dtype=torch.float64)
    return torch.cat([spread[:12], spread[12:].repeat_interleave(4, dim=0) + near])


@pytest.mark.parametrize("alpha_bar", [0.1, 0.4, 0.8])
def test_two_images_have_the_entropy_of_a_binary_choice(alpha_bar):
    """The log odds of the parent are normal with mean m and variance 2 m, m = a d^2 / (2 (1-a))."""
    images = torch.tensor([[[[0.3, -0.4]]], [[[-0.6, 0.5]]]], dtype=torch.float64)
    mean = alpha_bar * float((images[0] - images[1]).square().sum()) / (2 * (1 - alpha_bar))
    points, weights = np.polynomial.hermite_e.hermegauss(80)
    right = torch.tensor(mean + math.sqrt(2 * mean) * points).sigmoid()
    binary = torch.special.entr(right) + torch.special.entr(1 - right)
    expected = float(binary @ torch.tensor(weights)) / math.sqrt(2 * math.pi)
    drawn = torch.cat(
        [posterior_entropies(posterior_over(images), seed=s, alpha_bars=(alpha_bar,)) for s in range(1000)]
    )
    error = float(drawn.std()) / math.sqrt(len(drawn))
    assert abs(float(drawn.mean()) - expected) < 4 * error
    assert error < 0.01


def test_copies_of_one_image_have_log_of_their_number(generator):
    image = torch.rand(1, 1, 4, 4, generator=generator, dtype=torch.float64)
    entropies = posterior_entropies(posterior_over(image.expand(5, -1, -1, -1)), seed=0)
    torch.testing.assert_close(entropies, torch.full((5,), math.log(5), dtype=torch.float64))


def test_near_copies_are_covered_first_and_lone_images_last(planted):
    entropies = posterior_entropies(posterior_over(planted), seed=0)
    assert entropies.shape == (20,)
    assert (entropies <= math.log(20)).all()
    labels = torch.zeros(20, dtype=torch.int64)
    assert entropy_coverage(entropies, labels, 8).tolist() == list(range(12, 20))
    lone = torch.full((20,), 0).index_fill(0, torch.tensor([3]), 1)
    assert 3 in entropy_coverage(entropies, lone, 8).tolist(), "the only one of its class"


def test_levels_are_averaged_and_noise_is_the_seeds_alone(planted, monkeypatch):
    posterior = posterior_over(planted)
    both = posterior_entropies(posterior, seed=7, alpha_bars=(0.1, 0.4))
    first = posterior_entropies(posterior, seed=7, alpha_bars=(0.1,))
    assert torch.equal(posterior_entropies(posterior, seed=7, alpha_bars=(0.1, 0.4)), both)
    assert not torch.equal(posterior_entropies(posterior, seed=8, alpha_bars=(0.1, 0.4)), both)
    twice = posterior_entropies(posterior, seed=7, alpha_bars=(0.1, 0.1))
    assert not torch.equal(twice, first), "every level has noise of its own"
    # The noisier level alone is more undecided than its mean with a cleaner one.
    assert first.mean() > both.mean()
    monkeypatch.setattr("provgen.generators.closed_form.MAX_CHUNK_BYTES", 3 * 20 * 8)
    torch.testing.assert_close(posterior_entropies(posterior, seed=7, alpha_bars=(0.1, 0.4)), both)


@pytest.mark.parametrize("size", [4, 16, 32])
def test_neighbours_are_as_hard_to_tell_apart_at_every_size(size):
    """Six images, each bright in a channel of its own: all distances are the same."""
    images = 2.0 * torch.eye(6, dtype=torch.float64)[:, :, None, None].expand(-1, -1, size, size)
    levels = undecided_levels(posterior_over(images.contiguous()))
    squared = 2 * 4.0 * size**2  # two images differ by 2 in two of six channels
    odds = [level * squared / (2 * (1 - level)) for level in levels]
    assert odds == pytest.approx(ODDS)


def test_of_copies_alone_some_level_is_taken():
    images = torch.ones(3, 1, 2, 2, dtype=torch.float64)
    assert all(0 < level < 1 for level in undecided_levels(posterior_over(images)))
