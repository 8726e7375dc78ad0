"""How hard each training image is to tell from the others once it is noisy."""

from __future__ import annotations

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from provgen.data.random import Stream, seeded_generator
from provgen.generators.closed_form import ClosedFormPosterior
from provgen.tracing.attribution import entropy

ALPHA_BARS = (0.06, 0.1, 0.2, 0.4)
"""alpha_bars alpha_bar, the noisier ones of the trace window: at cleaner ones only copies have an entropy above 0."""


def posterior_entropies(
    posterior: ClosedFormPosterior, *, seed: int, alpha_bars: tuple[float, ...] = ALPHA_BARS
) -> Tensor:
    """Noise every training image and measure how undecided the closed form is about its parent.

    Args:
        posterior: Over the training images, all of them covered; no class is given.
        seed: Of the noise.
        alpha_bars: Levels alpha_bar over which entropies are averaged.

    Returns:
        Entropies in nats, (train,), from 0 to log train, in the dtype and on the device of the posterior.
    """
    return torch.stack(
        [_entropies_at(posterior, alpha_bar, seed, number) for number, alpha_bar in enumerate(alpha_bars)]
    ).mean(dim=0)


def _entropies_at(posterior: ClosedFormPosterior, alpha_bar: float, seed: int, number: int) -> Tensor:
    clean = posterior.rows
    noise = randn_tensor(
        clean.shape,
        generator=seeded_generator(seed, Stream.COVERAGE, number),
        device=clean.device,
        dtype=clean.dtype,
    )
    noisy = alpha_bar**0.5 * clean + (1 - alpha_bar) ** 0.5 * noise
    levels = torch.full((len(clean),), alpha_bar, dtype=clean.dtype, device=clean.device)
    no_class = torch.full_like(posterior.labels, posterior.null_label)
    return torch.cat([entropy(probs) for probs in posterior.chunks(noisy, levels, no_class)])
