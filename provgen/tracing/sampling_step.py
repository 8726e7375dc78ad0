"""One step of a denoiser's sampler, with everything that traces read."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SamplingStep:
    """One step of a sampler."""

    number: int
    """From 0."""
    timestep: Tensor
    """int64 scalar."""
    level: Tensor
    """alpha_bar, a scalar on the scheduler's device."""
    images: Tensor
    """What the denoiser was given, (query, channel, height, width)."""
    feature_maps: list[Tensor]
    """What its encoder made of it."""
    features: Tensor
    """What its last layer was given."""
    noise: Tensor
    """What that made of it, without guidance."""
    denoised: Tensor
    """What the next step is given; after the last step the sample."""
