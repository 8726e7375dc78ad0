"""How far a denoiser is from the one that has learned its training images by heart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor

from provgen.attribution.posterior import ClosedFormPosterior
from provgen.data.dataset import ImageSet
from provgen.training.batches import fixed_batches


@torch.no_grad()
def denoiser_divergence(
    unet: UNet2DModel,
    closed_form: ClosedFormPosterior,
    scheduler: DDPMScheduler,
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
        unet: The denoiser.
        closed_form: Posterior over the training images, on any device.
        scheduler: The forward process.
        images: What is noised.
        timesteps: Levels.
        seed: Of the noise.

    Returns:
        Nats, (query, level) on the CPU.
    """
    shape = tuple(images.images.shape[1:])
    batches = fixed_batches(images, torch.arange(len(images)), list(timesteps), noise_shape=shape, seed=seed)
    found = []
    for batch in batches:
        batch = batch.to(unet.device)
        labels, steps = batch.clean_labels, batch.timesteps
        noisy = scheduler.add_noise(batch.clean_images, batch.noise, steps)
        signal = scheduler.alphas_cumprod.to(unet.device)[steps]
        asked = (given.to(closed_form.rows.device) for given in (noisy, signal, labels))
        ideal = (closed_form.probs(*asked) @ closed_form.rows).view(noisy.shape).to(noisy.device)
        level = signal.view(-1, 1, 1, 1)
        ideal_noise = (noisy - level.sqrt() * ideal) / (1 - level).sqrt()
        predicted = unet(noisy, steps, class_labels=labels).sample
        found.append((predicted - ideal_noise).flatten(1).square().sum(dim=1).cpu() / 2)
    return torch.stack(found, dim=1)
