"""Denoising losses with a known answer, and the same noise for every denoiser."""

import math

import pytest
import torch

from provgen.analysis.denoising import denoising_losses
from provgen.models.diffusion import make_denoiser, make_training_scheduler


@pytest.fixture
def scheduler():
    return make_training_scheduler("linear")


@pytest.fixture
def denoiser():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make_denoiser("tiny", image_size=8, image_channels=1, num_classes=3).eval()


@pytest.fixture
def silent(denoiser):
    """A denoiser that always predicts no noise."""
    for parameter in denoiser.conv_out.parameters():
        torch.nn.init.zeros_(parameter)
    return denoiser


@pytest.fixture
def pixels(random_images):
    images = random_images(50)
    return images.images.float() / 127.5 - 1, images.labels


def measure(denoiser, scheduler, pixels, **changed):
    return denoising_losses(denoiser, scheduler, *pixels, **{"draws": 4, "seed": 0, **changed})


def test_predicting_no_noise_costs_one(silent, scheduler, pixels):
    losses = measure(silent, scheduler, pixels, draws=20)
    assert losses.shape == (50,)
    # Means of 20 x 64 squared normal numbers, of variance 2 each.
    assert float(losses.mean()) == pytest.approx(1, abs=4 * math.sqrt(2 / (50 * 20 * 64)))
    assert (losses - 1).abs().max() < 5 * math.sqrt(2 / (20 * 64))
    assert losses.std() > 0.01, "every image has noise of its own"


def test_equal_seeds_give_two_denoisers_the_same_noise(scheduler, pixels):
    # A constant prediction c costs mean((c - noise)^2), so two of them give the noise's mean away: it must agree.
    losses = {}
    for constant in (0.0, 1.0, -1.0):
        network = make_denoiser("tiny", image_size=8, image_channels=1, num_classes=3)
        for parameter in network.conv_out.parameters():
            torch.nn.init.zeros_(parameter)
        torch.nn.init.constant_(network.conv_out.bias, constant)
        losses[constant] = measure(network, scheduler, pixels)
    torch.testing.assert_close(losses[1.0] + losses[-1.0] - 2 * losses[0.0], torch.full((50,), 2.0))
    assert not torch.allclose(losses[1.0], losses[-1.0])


def test_losses_depend_on_the_seed_and_on_nothing_global(denoiser, scheduler, pixels):
    torch.manual_seed(0)
    first = measure(denoiser, scheduler, pixels)
    torch.manual_seed(1)
    assert torch.equal(measure(denoiser, scheduler, pixels), first)
    assert not torch.equal(measure(denoiser, scheduler, pixels, seed=1), first)


def test_labels_reach_the_denoiser(denoiser, scheduler, pixels):
    images, labels = pixels
    first = measure(denoiser, scheduler, pixels)
    changed = measure(denoiser, scheduler, (images, torch.where(labels == 0, 3, labels)))
    assert torch.equal(first != changed, labels == 0)


def test_more_images_than_fit_at_once_are_all_measured(silent, scheduler):
    images = torch.zeros(300, 1, 8, 8)
    losses = measure(silent, scheduler, (images, torch.zeros(300, dtype=torch.int64)), draws=1)
    assert (losses > 0.3).all()
    assert (losses < 2.5).all()


def test_draws_are_spread_over_the_whole_schedule(scheduler, pixels):
    # Random weights tell noise levels apart; each draw's part of the schedule is met by some image.
    images, labels = pixels
    seen = []

    network = make_denoiser("tiny", image_size=8, image_channels=1, num_classes=3)
    network.register_forward_pre_hook(lambda _module, given: seen.append(given[1]))
    denoising_losses(network, scheduler, images, labels, draws=5, seed=0)
    for draw, timesteps in enumerate(seen):
        assert timesteps.min() >= 200 * draw
        assert timesteps.max() < 200 * (draw + 1)
        assert timesteps.max() - timesteps.min() > 100
    assert len(seen) == 5
