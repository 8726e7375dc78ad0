"""Losses of generators with a known answer, and the same noise for every generator."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from provgen.generators.kinds import make_kind
from provgen.generators.losses import generator_losses
from provgen.generators.observers import DiffusionObserver
from provgen.models.diffusion import make_denoiser, make_training_scheduler


@pytest.fixture
def observer():
    return DiffusionObserver(make_training_scheduler("linear"), torch.device("cpu"))


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
def images(random_images):
    return random_images(50)


def measure(observer, network, images, **changed):
    shape = tuple(images.images.shape[1:])
    asked = {"noise_shape": shape, "draws": 4, "seed": 0, **changed}
    losses = generator_losses(observer, network, images, **asked)
    assert losses.shape == (len(images), asked["draws"])
    return losses.mean(dim=1)


def test_predicting_no_noise_costs_one(observer, silent, images):
    losses = measure(observer, silent, images, draws=20)
    assert losses.shape == (50,)
    # Means of 20 x 64 squared normal numbers, of variance 2 each.
    assert float(losses.mean()) == pytest.approx(1, abs=4 * math.sqrt(2 / (50 * 20 * 64)))
    assert (losses - 1).abs().max() < 5 * math.sqrt(2 / (20 * 64))
    assert losses.std() > 0.01, "every image has noise of its own"


def test_equal_seeds_give_two_denoisers_the_same_noise(observer, images):
    # A constant prediction c costs mean((c - noise)^2), so two of them give the noise's mean away: it must agree.
    losses = {}
    for constant in (0.0, 1.0, -1.0):
        network = make_denoiser("tiny", image_size=8, image_channels=1, num_classes=3)
        for parameter in network.conv_out.parameters():
            torch.nn.init.zeros_(parameter)
        torch.nn.init.constant_(network.conv_out.bias, constant)
        losses[constant] = measure(observer, network, images)
    torch.testing.assert_close(losses[1.0] + losses[-1.0] - 2 * losses[0.0], torch.full((50,), 2.0))
    assert not torch.allclose(losses[1.0], losses[-1.0])


def test_losses_depend_on_the_seed_and_on_nothing_global(observer, denoiser, images):
    torch.manual_seed(0)
    first = measure(observer, denoiser, images)
    torch.manual_seed(1)
    assert torch.equal(measure(observer, denoiser, images), first)
    assert not torch.equal(measure(observer, denoiser, images, seed=1), first)


def test_labels_reach_the_denoiser(observer, denoiser, images):
    labels = images.labels
    first = measure(observer, denoiser, images)
    changed = replace(images, labels=torch.where(labels == 0, 3, labels))
    assert torch.equal(first != measure(observer, denoiser, changed), labels == 0)


def test_more_images_than_fit_at_once_are_all_measured(observer, silent, random_images):
    losses = measure(observer, silent, random_images(300), draws=1)
    assert losses.shape == (300,)
    assert (losses > 0.3).all()
    assert (losses < 2.5).all()


def test_draws_are_spread_over_the_whole_schedule(observer, images):
    # Random weights tell noise levels apart; each draw's part of the schedule is met by some image.
    seen = []
    network = make_denoiser("tiny", image_size=8, image_channels=1, num_classes=3)
    network.register_forward_pre_hook(lambda _module, given: seen.append(given[1]))
    measure(observer, network, images, draws=5)
    for draw, timesteps in enumerate(seen):
        assert timesteps.min() >= 200 * draw
        assert timesteps.max() < 200 * (draw + 1)
        assert timesteps.max() - timesteps.min() > 100
    assert len(seen) == 5


@pytest.fixture
def of_kind(tiny_settings, images):
    """Make the observer and a random network of a kind, and the shape of its noise."""

    def call(name, *overrides):
        kind = make_kind(tiny_settings(f"generator.kind={name}", *overrides), images)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = kind.make_network().eval()
        return kind.make_observer(torch.device("cpu")), network, kind.noise_shape()

    return call


def test_an_autoencoder_of_constants_costs_its_squared_error_and_its_divergence(of_kind, images):
    observer, network, shape = of_kind("vae", "generator.kl_weight=0.5")
    for layer in (network.decoder.conv_out, network.quant_conv):
        for parameter in layer.parameters():
            torch.nn.init.zeros_(parameter)
    torch.nn.init.constant_(network.decoder.conv_out.bias, 0.25)
    mean, log_variance = network.quant_conv.bias.data.chunk(2)
    mean.fill_(0.6)
    log_variance.fill_(-1.2)
    errors = (images.images.double() / 127.5 - 1 - 0.25).square().flatten(1).mean(dim=1)
    divergence = math.prod(shape) * (0.6**2 + math.exp(-1.2) - 1 + 1.2) / 2 / 64
    losses = measure(observer, network, images, noise_shape=shape)
    torch.testing.assert_close(losses.double(), errors + 0.5 * divergence, rtol=1e-5, atol=1e-6)


def test_an_autoencoder_is_measured_on_latents_of_its_own_for_every_image_and_draw(of_kind, images):
    observer, network, shape = of_kind("vae")
    seen = []
    network.register_forward_pre_hook(lambda _module, given: seen.append(given[1]))
    measure(observer, network, images, noise_shape=shape, draws=3)
    noise = torch.stack(seen)
    assert noise.shape == (3, 50, *shape)
    assert len({tuple(row.tolist()) for row in noise.reshape(150, -1)}) == 150
    assert float(noise.std()) == pytest.approx(1, abs=0.1)


def test_the_loss_of_a_classifier_is_its_cross_entropy_without_any_noise(of_kind, images):
    observer, network, shape = of_kind("none")
    first, second = (
        measure(observer, network, images, noise_shape=shape, draws=draws, seed=seed)
        for draws, seed in ((1, 0), (3, 7))
    )
    torch.testing.assert_close(first, second)
    with torch.no_grad():
        logits = network(images.images.float() / 127.5 - 1).class_logits
    expected = 0.01 * F.cross_entropy(logits, images.labels, reduction="none")
    torch.testing.assert_close(first, expected)
