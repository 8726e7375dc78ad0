"""How hard each training image is to tell from the others once it is noisy."""

from __future__ import annotations

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from provgen.data.random import Stream, seeded_generator
from provgen.generators.closed_form import ClosedFormPosterior
from provgen.tracing.attribution import entropy

SIGNAL_LEVELS = (0.06, 0.1, 0.2, 0.4)
"""Signal levels a_t, the noisier ones of the trace window: at cleaner ones only copies have an entropy above 0."""


def posterior_entropies(
    posterior: ClosedFormPosterior, *, seed: int, signal_levels: tuple[float, ...] = SIGNAL_LEVELS
) -> Tensor:
    """Noise every training image and measure how undecided the closed form is about its parent.

    Args:
        posterior: Over the training images, all of them covered; no class is given.
        seed: Of the noise.
        signal_levels: Levels a_t over which entropies are averaged.

    Returns:
        Entropies in nats, (train,), from 0 to log train, in the dtype and on the device of the posterior.
    """
    return torch.stack(
        [_entropies_at(posterior, signal, seed, number) for number, signal in enumerate(signal_levels)]
    ).mean(dim=0)


def _entropies_at(posterior: ClosedFormPosterior, signal: float, seed: int, number: int) -> Tensor:
    clean = posterior.rows
    noise = randn_tensor(
        clean.shape,
        generator=seeded_generator(seed, Stream.COVERAGE, number),
        device=clean.device,
        dtype=clean.dtype,
    )
    noisy = signal**0.5 * clean + (1 - signal) ** 0.5 * noise
    levels = torch.full((len(clean),), signal, dtype=clean.dtype, device=clean.device)
    no_class = torch.full_like(posterior.labels, posterior.null_label)
    return torch.cat([entropy(probs) for probs in posterior.chunks(noisy, levels, no_class)])
