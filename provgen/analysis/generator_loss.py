"""The generator's own loss on given images with fixed noise, so that two generators compare pair by pair."""

from __future__ import annotations

import torch
from diffusers import ModelMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from provgen.data.dataset import ImageSet
from provgen.data.images import to_unit_range
from provgen.models.diffusion import NUM_TRAIN_TIMESTEPS
from provgen.training.batches import Batch, seeded_generator
from provgen.training.observers import Observer

BATCH = 256
"""Images at a time."""


@torch.no_grad()
def generator_losses(
    observer: Observer,
    network: ModelMixin,
    images: ImageSet,
    *,
    noise_shape: tuple[int, ...],
    draws: int,
    seed: int,
) -> Tensor:
    """Loss of each image in every draw: squared error of the noise, or reconstruction and divergence of an autoencoder.

    Timesteps are stratified over the schedule: draw d of an image falls into the d-th of `draws` equal parts.

    Args:
        observer: How the network is run.
        network: Of the generator.
        images: The queries, with the labels a denoiser is told.
        noise_shape: Of one row of noise.
        draws: Noise levels, or latents, per image.
        seed: Of timesteps and noise; equal seeds give equal noise to every generator.

    Returns:
        (query, draw) on the CPU, from clean to noisy where there are noise levels.
    """
    generator = seeded_generator(seed, 3)
    losses = torch.zeros(len(images), draws)
    for draw in range(draws):
        noise = randn_tensor(
            (len(images), *noise_shape), generator=generator, dtype=torch.get_default_dtype()
        )
        places = draw + torch.rand(len(images), generator=generator, dtype=torch.float64)
        batch = Batch(
            indices=torch.arange(len(images)),
            clean_images=to_unit_range(images.images),
            noise=noise,
            timesteps=(places * NUM_TRAIN_TIMESTEPS / draws).long(),
            labels=images.labels,
            clean_labels=images.labels,
        )
        for rows in torch.arange(len(images)).split(BATCH):
            part = batch.select(rows).to(network.device)
            losses[rows, draw] = observer.observe(network, part, shows_stages=False).loss.cpu()
    return losses
