"""Losses of generators with a known answer, the same noise for every generator, and the distance to the closed form."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from provgen.data.batches import fixed_batches
from provgen.generators.losses import denoiser_divergence, generator_losses
from provgen.models.diffusion import make_denoiser

TIMESTEPS = (50, 300, 800)


@pytest.fixture
def images(random_images):
    return random_images(50)


@pytest.fixture
def denoising(make):
    return make("diffusion")


@pytest.fixture
def silent(denoising):
    """A denoiser that always predicts no noise."""
    for parameter in denoising.network.conv_out.parameters():
        torch.nn.init.zeros_(parameter)
    return denoising


def measure(generator, images, **changed):
    asked = {"draws": 4, "seed": 0, **changed}
    losses = generator_losses(generator, images, **asked)
    assert losses.shape == (len(images), asked["draws"] if generator.reads_noise else 1)
    return losses.mean(dim=1)


def test_predicting_no_noise_costs_one(silent, images):
    losses = measure(silent, images, draws=20)
    assert losses.shape == (50,)
    # Means of 20 x 64 squared normal numbers, of variance 2 each.
    assert float(losses.mean()) == pytest.approx(1, abs=4 * math.sqrt(2 / (50 * 20 * 64)))
    assert (losses - 1).abs().max() < 5 * math.sqrt(2 / (20 * 64))
    assert losses.std() > 0.01, "every image has noise of its own"


def test_equal_seeds_give_two_denoisers_the_same_noise(denoising, images):
    # A constant prediction c costs mean((c - noise)^2), so two of them give the noise's mean away: it must agree.
    losses = {}
    for constant in (0.0, 1.0, -1.0):
        network = make_denoiser("tiny", image_size=8, image_channels=1, num_classes=3)
        for parameter in network.conv_out.parameters():
            torch.nn.init.zeros_(parameter)
        torch.nn.init.constant_(network.conv_out.bias, constant)
        losses[constant] = measure(denoising.with_network(network), images)
    torch.testing.assert_close(losses[1.0] + losses[-1.0] - 2 * losses[0.0], torch.full((50,), 2.0))
    assert not torch.allclose(losses[1.0], losses[-1.0])


def test_losses_depend_on_the_seed_and_on_nothing_global(denoising, images):
    torch.manual_seed(0)
    first = measure(denoising, images)
    torch.manual_seed(1)
    assert torch.equal(measure(denoising, images), first)
    assert not torch.equal(measure(denoising, images, seed=1), first)


def test_labels_reach_the_denoiser(denoising, images):
    labels = images.labels
    first = measure(denoising, images)
    changed = replace(images, labels=torch.where(labels == 0, 3, labels))
    assert torch.equal(first != measure(denoising, changed), labels == 0)


def test_more_images_than_fit_at_once_are_all_measured(silent, random_images):
    losses = measure(silent, random_images(300), draws=1)
    assert losses.shape == (300,)
    assert (losses > 0.3).all()
    assert (losses < 2.5).all()


def test_draws_are_spread_over_the_whole_schedule(denoising, images):
    # Random weights tell noise levels apart; each draw's part of the schedule is met by some image.
    seen = []
    network = make_denoiser("tiny", image_size=8, image_channels=1, num_classes=3)
    network.register_forward_pre_hook(lambda _module, given: seen.append(given[1]))
    measure(denoising.with_network(network), images, draws=5)
    for draw, timesteps in enumerate(seen):
        assert timesteps.min() >= 200 * draw
        assert timesteps.max() < 200 * (draw + 1)
        assert timesteps.max() - timesteps.min() > 100
    assert len(seen) == 5


def test_an_autoencoder_of_constants_costs_its_squared_error_and_its_divergence(make, images):
    generator = make("vae", "generator.kl_weight=0.5")
    network = generator.network
    for layer in (network.decoder.conv_out, network.quant_conv):
        for parameter in layer.parameters():
            torch.nn.init.zeros_(parameter)
    torch.nn.init.constant_(network.decoder.conv_out.bias, 0.25)
    mean, log_variance = network.quant_conv.bias.data.chunk(2)
    mean.fill_(0.6)
    log_variance.fill_(-1.2)
    errors = (images.images.double() / 127.5 - 1 - 0.25).square().flatten(1).mean(dim=1)
    divergence = math.prod(generator.noise_shape) * (0.6**2 + math.exp(-1.2) - 1 + 1.2) / 2 / 64
    losses = measure(generator, images)
    torch.testing.assert_close(losses.double(), errors + 0.5 * divergence, rtol=1e-5, atol=1e-6)


def test_an_autoencoder_is_measured_on_latents_of_its_own_for_every_image_and_draw(make, images):
    generator = make("vae")
    seen = []
    generator.network.register_forward_pre_hook(lambda _module, given: seen.append(given[1]))
    measure(generator, images, draws=3)
    noise = torch.stack(seen)
    assert noise.shape == (3, 50, *generator.noise_shape)
    assert len({tuple(row.tolist()) for row in noise.reshape(150, -1)}) == 150
    assert float(noise.std()) == pytest.approx(1, abs=0.1)


def test_the_loss_of_a_classifier_is_its_cross_entropy_without_any_noise(make, images):
    classifier = make("none")
    first, second = (measure(classifier, images, draws=draws, seed=seed) for draws, seed in ((1, 0), (3, 7)))
    torch.testing.assert_close(first, second)
    with torch.no_grad():
        logits = classifier.network(images.images.float() / 127.5 - 1).class_logits
    expected = 0.01 * F.cross_entropy(logits, images.labels, reduction="none")
    torch.testing.assert_close(first, expected)


@pytest.fixture
def twelve(random_images):
    return random_images(12)


@torch.no_grad()
def test_it_is_the_divergence_of_gaussians_around_denoised_images(twelve, denoising, closed_form_of):
    closed_form = closed_form_of(twelve)
    found = denoiser_divergence(denoising, closed_form, twelve, timesteps=TIMESTEPS, seed=3)
    assert found.shape == (12, 3)
    batch = fixed_batches(twelve, torch.arange(12), list(TIMESTEPS), noise_shape=(1, 8, 8), seed=3)[1]
    a = denoising.scheduler.alphas_cumprod[300]
    noisy = a.sqrt() * batch.clean_images + (1 - a).sqrt() * batch.noise
    predicted = denoising.network(noisy, batch.timesteps, class_labels=twelve.labels).sample
    denoised = (noisy - (1 - a).sqrt() * predicted) / a.sqrt()
    ideal = closed_form.probs(noisy, a.expand(12), twelve.labels) @ closed_form.rows
    first, second = (
        torch.distributions.MultivariateNormal(
            a.sqrt().double() * clean.double(), (1 - a).double() * torch.eye(64, dtype=torch.float64)
        )
        for clean in (denoised.flatten(1), ideal)
    )
    expected = torch.distributions.kl_divergence(first, second)
    torch.testing.assert_close(found[:, 1].double(), expected, rtol=1e-4, atol=1e-4)


def test_a_denoiser_that_knows_one_image_by_heart_has_none(twelve, denoising, closed_form_of):
    one = twelve.select(torch.tensor([4]))
    batch, *_ = fixed_batches(one, torch.arange(1), [300], noise_shape=(1, 8, 8), seed=0)

    class Heart(torch.nn.Module):
        device = torch.device("cpu")
        config = denoising.network.config

        def forward(self, noisy, steps, class_labels):
            return type("Output", (), {"sample": batch.noise})

    heart = denoising.with_network(Heart())
    found = denoiser_divergence(heart, closed_form_of(one), one, timesteps=[300], seed=0)
    assert found.abs().max() < 1e-8
