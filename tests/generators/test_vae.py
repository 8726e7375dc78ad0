"""The autoencoder's losses by hand and against distributions; what it decodes, and what it refuses."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

from provgen.data.random import Stream, seeded_generator
from provgen.generators.vae import LATENT_DRAWS, vae_loss
from provgen.models.classifier import CLEAN_ALPHA_BAR

NULL = 3
ASKED = {"null_label": NULL, "num_inference_steps": 50, "guidance_scale": 1.0}
CPU = torch.device("cpu")


@pytest.fixture
def autoencoder(make):
    return make("vae", "generator.kl_weight=0.7")


@torch.no_grad()
def test_an_autoencoder_is_charged_for_pixels_and_divergence(autoencoder, make_batch):
    network, batch = autoencoder.network, make_batch(autoencoder)
    output = autoencoder.forward(batch)
    encoded = network(batch.clean_images, batch.noise, with_feature_maps=True)
    decoded = network.decode(output.query).sample
    errors = [F.mse_loss(a, b) for a, b in zip(decoded, batch.clean_images, strict=True)]
    torch.testing.assert_close(output.parts["reconstruction_loss"], torch.stack(errors))
    gaussians = Normal(encoded.mean, (encoded.log_variance / 2).exp())
    divergence = kl_divergence(gaussians, Normal(0.0, 1.0)).flatten(1).sum(1) / 64
    torch.testing.assert_close(output.parts["latent_divergence"], divergence)
    torch.testing.assert_close(output.loss, torch.stack(errors) + 0.7 * divergence)
    torch.testing.assert_close(output.query, gaussians.mean + gaussians.stddev * batch.noise)


@torch.no_grad()
def test_the_feature_maps_of_an_autoencoder_are_those_of_what_it_decodes(autoencoder, make_batch):
    network = autoencoder.network
    output = autoencoder.forward(make_batch(autoencoder))
    decoded = network.decode(output.query).sample
    torch.testing.assert_close(output.feature_maps, network.feature_maps_of(decoded))
    torch.testing.assert_close(output.feature_maps[0], decoded)
    assert torch.equal(output.alpha_bar, torch.full((12,), CLEAN_ALPHA_BAR))
    assert (output.class_labels == NULL).all(), "an autoencoder is given no class"
    assert output.class_logits is None


def test_vae_loss_by_hand():
    images = torch.zeros(2, 1, 2, 2)
    reconstruction = torch.stack([torch.full((1, 2, 2), 0.5), torch.tensor([[[0.0, 2.0], [0.0, 0.0]]])])
    mean, log_variance = torch.tensor([[0.0, 0.0], [2.0, 1.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    errors, divergence = vae_loss(reconstruction, images, mean, log_variance)
    torch.testing.assert_close(errors, torch.tensor([0.25, 1.0]))
    # Means 2 and 1: (4 + 1) / 2; log variance 1: (e - 1 - 1) / 2. Over four pixels.
    torch.testing.assert_close(divergence, torch.tensor([0.0, (5 + math.e - 2) / 8]))


def test_the_divergence_of_a_vae_is_that_of_its_gaussians(generator):
    images, reconstruction = (torch.rand(4, 3, 6, 6, generator=generator) for _ in range(2))
    mean, log_variance = (torch.randn(4, 2, 3, 3, generator=generator) for _ in range(2))
    latent = Normal(mean, (log_variance / 2).exp())
    expected = kl_divergence(latent, Normal(0.0, 1.0)).sum((1, 2, 3)) / (3 * 6 * 6)
    torch.testing.assert_close(vae_loss(reconstruction, images, mean, log_variance)[1], expected)


def test_both_parts_of_the_vae_loss_are_the_same_at_twice_the_resolution(generator):
    images, reconstruction = (torch.rand(4, 3, 6, 6, generator=generator) for _ in range(2))
    mean, log_variance = (torch.randn(4, 2, 3, 3, generator=generator) for _ in range(2))
    plain = vae_loss(reconstruction, images, mean, log_variance)
    doubled = vae_loss(*(t.repeat(1, 1, 2, 2) for t in (reconstruction, images, mean, log_variance)))
    torch.testing.assert_close(doubled, plain)


@torch.no_grad()
def test_a_sample_is_decoded_from_the_prior_in_one_step(autoencoder, seeds):
    (step,) = autoencoder.sample(torch.full((3,), NULL), generator=seeds(0, 1, 2), **ASKED)
    shape = (1, *autoencoder.noise_shape)
    latents = torch.cat([torch.randn(shape, generator=seed) for seed in seeds(0, 1, 2)])
    assert torch.equal(step.query, latents)
    decoded = autoencoder.network.decode(latents).sample
    torch.testing.assert_close(step.images, decoded)
    torch.testing.assert_close(step.feature_maps, autoencoder.network.feature_maps_of(decoded))


@torch.no_grad()
def test_outside_images_are_decoded_from_latents_of_their_own_gaussians(autoencoder, pixels):
    steps = list(autoencoder.renoise(pixels, torch.arange(12) % 4, num_inference_steps=50, seed=5))
    encoded = autoencoder.network.encode(pixels).latent_dist
    assert len(steps) == LATENT_DRAWS
    for draw, step in enumerate(steps):
        noise = torch.randn(autoencoder.noise_shape, generator=seeded_generator(5, Stream.LATENT, draw))
        torch.testing.assert_close(step.query, encoded.mean + encoded.std * noise)
        torch.testing.assert_close(step.images, autoencoder.network.decode(step.query).sample)
        torch.testing.assert_close(step.feature_maps, autoencoder.network.feature_maps_of(step.images))


@pytest.mark.parametrize("label", [0, 2])
def test_an_autoencoder_cannot_be_given_a_class(label, autoencoder, seeds, message_of):
    steps = autoencoder.sample(torch.tensor([NULL, label]), generator=seeds(0, 1), **ASKED)
    assert "without class labels" in message_of(next, steps)


@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_an_autoencoder_cannot_be_guided(scale, autoencoder, seeds, message_of):
    asked = {**ASKED, "guidance_scale": scale}
    steps = autoencoder.sample(torch.tensor([NULL]), generator=seeds(0), **asked)
    assert f"guidance_scale must be 1, got {scale}" in message_of(next, steps)


@torch.no_grad()
def test_images_are_encoded_as_they_are(autoencoder, pixels):
    expected = autoencoder.network.feature_maps_of(pixels)[-1].flatten(1)
    torch.testing.assert_close(autoencoder.encode(pixels), expected)


def test_the_closed_form_of_an_autoencoder_compares_the_gaussians_of_all_examples(autoencoder, images, pixels):
    closed_form = autoencoder.closed_form(images, dtype=torch.float64, device=CPU)
    output = autoencoder.network(pixels, torch.zeros(12, *autoencoder.noise_shape), with_feature_maps=False)
    gaussians = Normal(output.mean.double(), (output.log_variance.double() / 2).exp())
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(5, *autoencoder.noise_shape, generator=generator, dtype=torch.float64)
    densities = gaussians.log_prob(latents[:, None]).flatten(2).sum(2)
    labels, alpha_bar = torch.tensor([3, 0, 3, 2, 3]), torch.full((5,), CLEAN_ALPHA_BAR)
    ruled_out = (labels[:, None] != NULL) & (labels[:, None] != images.labels)
    expected = densities.masked_fill(ruled_out, -torch.inf).softmax(dim=1)
    torch.testing.assert_close(closed_form.probs(latents, alpha_bar, labels), expected, rtol=1e-5, atol=1e-9)
    assert ((expected > 0.01) & (expected < 0.9)).sum() > 5, "undecided enough for the test to fail"
