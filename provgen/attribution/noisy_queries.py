"""Queries at several noise levels: on their own sampling trajectory, or noised again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class NoisyQueries:
    """x_t of every query at several steps, from noise to image."""

    images: Tensor
    """(step, query, channel, height, width)."""
    timesteps: Tensor
    """int64 (step,)."""
    signal: Tensor
    """a_t of the steps, (step,)."""

    def select(self, rows: Tensor) -> NoisyQueries:
        """Keep the queries `rows`, int64 (selected,)."""
        return NoisyQueries(images=self.images[:, rows], timesteps=self.timesteps, signal=self.signal)

    @staticmethod
    def concatenate(parts: list[NoisyQueries]) -> NoisyQueries:
        """Join further queries at the same steps."""
        images = torch.cat([part.images for part in parts], dim=1)
        return NoisyQueries(images=images, timesteps=parts[0].timesteps, signal=parts[0].signal)
