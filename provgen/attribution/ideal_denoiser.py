"""The generator that knows only its training images: DDIM with the closed-form denoiser."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from provgen.attribution.noisy_queries import NoisyQueries
from provgen.attribution.posterior import ClosedFormPosterior
from provgen.attribution.trajectory import LEAST_SIGNAL


def ideal_samples(
    closed_form: ClosedFormPosterior,
    scheduler: DDIMScheduler,
    noise: Tensor,
    class_labels: Tensor,
    *,
    num_inference_steps: int,
) -> tuple[Tensor, NoisyQueries]:
    """Sample with E[x_0 | x_t] = sum over i of p(i | x_t) x_i, the denoiser of least loss on the training images.

    It ends on training images, or on a mean of several that lie so close together that the last step cannot tell
    them apart (e.g. Gu et al. 2023, arXiv 2310.02664).

    Args:
        closed_form: Posterior over the training images.
        scheduler: Predicts the noise.
        noise: Where sampling starts, (query, channel, height, width).
        class_labels: int64 (query,); the null label allows all training images.
        num_inference_steps: DDIM steps.

    Returns:
        Images in [-1, 1], (query, channel, height, width), and what each was at every step worth tracing.
    """
    scheduler.set_timesteps(num_inference_steps)
    images, traced = noise, []
    for timestep in scheduler.timesteps:
        level = scheduler.alphas_cumprod[timestep].to(noise)
        if level >= LEAST_SIGNAL:
            traced.append(images)
        probs = closed_form.probs(images, level.expand(len(images)), class_labels)
        denoised = (probs @ closed_form.rows).view_as(images)
        predicted_noise = (images - level.sqrt() * denoised) / (1 - level).sqrt()
        images = scheduler.step(predicted_noise, timestep, images).prev_sample
    timesteps = scheduler.timesteps[-len(traced) :]
    return images, NoisyQueries(
        images=torch.stack(traced), timesteps=timesteps, signal=scheduler.alphas_cumprod[timesteps]
    )
