"""Denoising loss on given images with fixed noise, so that two denoisers can be compared pair by pair."""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from provgen.training.batches import seeded_generator


@torch.no_grad()
def denoising_losses(
    denoiser: UNet2DModel,
    noise_scheduler: DDPMScheduler,
    images: Tensor,
    labels: Tensor,
    *,
    draws: int,
    seed: int,
) -> Tensor:
    """Mean squared error of the predicted noise, per image.

    Timesteps are stratified over the schedule: draw d of an image falls into the d-th of `draws` equal parts.

    Args:
        denoiser: Network that predicts the noise.
        noise_scheduler: The forward process.
        images: In [-1, 1], (query, channel, height, width).
        labels: int64 (query,).
        draws: Noise levels per image.
        seed: Of timesteps and noise; equal seeds give equal noise to every denoiser.

    Returns:
        (query,), mean over the draws, on the CPU.
    """
    generator = seeded_generator(seed, 3)
    part = noise_scheduler.config.num_train_timesteps / draws
    total = torch.zeros(len(images))
    for draw in range(draws):
        noise = randn_tensor(images.shape, generator=generator, dtype=images.dtype)
        places = draw + torch.rand(len(images), generator=generator, dtype=torch.float64)
        timesteps = (places * part).long()
        noisy = noise_scheduler.add_noise(images, noise, timesteps)
        for rows in torch.arange(len(images)).split(256):
            predicted = denoiser(
                noisy[rows].to(denoiser.device),
                timesteps[rows].to(denoiser.device),
                class_labels=labels[rows].to(denoiser.device),
            ).sample
            total[rows] += (predicted.cpu() - noise[rows]).square().flatten(1).mean(dim=1)
    return total / draws
