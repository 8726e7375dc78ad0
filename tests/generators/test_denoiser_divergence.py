"""The divergence against a worked level, and zero for the closed form itself."""

import pytest
import torch

from provgen.data.batches import fixed_batches
from provgen.generators.losses import denoiser_divergence
from provgen.models.diffusion import make_denoiser, make_training_scheduler

TIMESTEPS = (50, 300, 800)


@pytest.fixture
def images(random_images):
    return random_images(12)


@pytest.fixture
def denoiser():
    torch.manual_seed(0)
    return make_denoiser("tiny", image_size=8, image_channels=1, num_classes=3).eval()


@torch.no_grad()
def test_it_is_the_divergence_of_gaussians_around_denoised_images(images, denoiser, closed_form_of):
    scheduler, closed_form = make_training_scheduler("linear"), closed_form_of(images)
    found = denoiser_divergence(denoiser, closed_form, scheduler, images, timesteps=TIMESTEPS, seed=3)
    assert found.shape == (12, 3)
    batch = fixed_batches(images, torch.arange(12), list(TIMESTEPS), noise_shape=(1, 8, 8), seed=3)[1]
    a = scheduler.alphas_cumprod[300]
    noisy = a.sqrt() * batch.clean_images + (1 - a).sqrt() * batch.noise
    predicted = denoiser(noisy, batch.timesteps, class_labels=images.labels).sample
    denoised = (noisy - (1 - a).sqrt() * predicted) / a.sqrt()
    ideal = closed_form.probs(noisy, a.expand(12), images.labels) @ closed_form.rows
    first, second = (
        torch.distributions.MultivariateNormal(
            a.sqrt().double() * some.double(), (1 - a).double() * torch.eye(64, dtype=torch.float64)
        )
        for some in (denoised.flatten(1), ideal)
    )
    expected = torch.distributions.kl_divergence(first, second)
    torch.testing.assert_close(found[:, 1].double(), expected, rtol=1e-4, atol=1e-4)


def test_a_denoiser_that_knows_one_image_by_heart_has_none(images, closed_form_of):
    one = images.select(torch.tensor([4]))
    scheduler, (batch, *_) = (
        make_training_scheduler("linear"),
        fixed_batches(one, torch.arange(1), [300], noise_shape=(1, 8, 8), seed=0),
    )

    class Heart(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, noisy, steps, class_labels):
            return type("Output", (), {"sample": batch.noise})

    found = denoiser_divergence(Heart(), closed_form_of(one), scheduler, one, timesteps=[300], seed=0)
    assert found.abs().max() < 1e-8
