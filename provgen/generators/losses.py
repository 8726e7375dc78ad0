"""A generator's own loss on given images with fixed noise, and how far it is from the closed form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from provgen.data.batches import Batch, fixed_batches
from provgen.data.dataset import ImageSet
from provgen.data.images import to_unit_range
from provgen.data.random import Stream, seeded_generator
from provgen.generators.closed_form import ClosedFormPosterior
from provgen.generators.diffusion import DiffusionGenerator
from provgen.generators.protocol import Generator
from provgen.models.diffusion import NUM_TRAIN_TIMESTEPS, denoised

BATCH = 256
"""Images at a time."""


@torch.no_grad()
def generator_losses(generator: Generator, images: ImageSet, *, draws: int, seed: int) -> Tensor:
    """Loss of each image in every draw: a denoiser's squared error, or an autoencoder's reconstruction and divergence.

    Timesteps are stratified over the schedule: draw d of an image falls into the d-th of `draws` equal parts.

    Args:
        generator: Generator with its network.
        images: Queries, with the labels a denoiser is given.
        draws: Noise levels, or latents, per image; a generator that reads no noise has one.
        seed: Seed of timesteps and noise; equal seeds give equal noise to every generator.

    Returns:
        (query, draw) on the CPU, from clean to noisy where there are noise levels.
    """
    draws = draws if generator.reads_noise else 1
    random = seeded_generator(seed, Stream.LOSS)
    losses = torch.zeros(len(images), draws)
    for draw in range(draws):
        shape = (len(images), *generator.noise_shape)
        noise = randn_tensor(shape, generator=random, dtype=torch.get_default_dtype())
        places = draw + torch.rand(len(images), generator=random, dtype=torch.float64)
        batch = Batch(
            indices=torch.arange(len(images)),
            clean_images=to_unit_range(images.images),
            noise=noise,
            timesteps=(places * NUM_TRAIN_TIMESTEPS / draws).long(),
            labels=images.labels,
            clean_labels=images.labels,
        )
        for rows in torch.arange(len(images)).split(BATCH):
            part = batch.select(rows).to(generator.network.device)
            losses[rows, draw] = generator.forward(part, with_feature_maps=False).loss.cpu()
    return losses


@torch.no_grad()
def denoiser_divergence(
    generator: DiffusionGenerator,
    closed_form: ClosedFormPosterior,
    images: ImageSet,
    *,
    timesteps: Sequence[int],
    seed: int,
) -> Tensor:
    """Give the divergence of the network's denoised images from the closed form's, at every level.

    Denoising says that x_t is N(sqrt(a) x_0, (1 - a) I) of some x_0: the divergence of two such Gaussians is
    a / (2 (1 - a)) |x_0 - x_0'|^2, which is half the squared distance of the two predicted noises. The closed form is
    the denoiser of least loss on the training images, and generates nothing but them.

    Args:
        generator: The denoiser.
        closed_form: Posterior over the training images, on any device.
        images: Images that are noised.
        timesteps: Noise levels.
        seed: Seed of the noise.

    Returns:
        Nats, (query, level) on the CPU.
    """
    unet, scheduler = generator.network, generator.scheduler
    shape = generator.noise_shape
    batches = fixed_batches(images, torch.arange(len(images)), list(timesteps), noise_shape=shape, seed=seed)
    found = []
    for batch in batches:
        batch = batch.to(unet.device)
        labels, steps = batch.clean_labels, batch.timesteps
        noisy = scheduler.add_noise(batch.clean_images, batch.noise, steps)
        alpha_bar = scheduler.alphas_cumprod.to(unet.device)[steps]
        asked = (given.to(closed_form.rows.device) for given in (noisy, alpha_bar, labels))
        ideal = (closed_form.probs(*asked) @ closed_form.rows).view(noisy.shape).to(noisy.device)
        level = alpha_bar.view(-1, 1, 1, 1)
        ideal_noise = (noisy - level.sqrt() * ideal) / (1 - level).sqrt()
        output = unet(noisy, steps, class_labels=labels).sample
        _, predicted_noise = denoised(scheduler, noisy, output, level)
        found.append((predicted_noise - ideal_noise).flatten(1).square().sum(dim=1).cpu() / 2)
    return torch.stack(found, dim=1)
