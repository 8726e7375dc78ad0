"""Queries at several noise levels: on their own sampling trajectory, or noised again."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class NoisyQueries:
    """x_t of every query at several steps, from noise to image."""

    images: Tensor
    """(step, query, channel, height, width)."""
    timesteps: Tensor
    """int64 (step,)."""
    alpha_bar: Tensor
    """alpha_bar of the steps, (step,)."""

    def first(self, count: int) -> NoisyQueries:
        """Keep the first `count` queries."""
        return NoisyQueries(images=self.images[:, :count], timesteps=self.timesteps, alpha_bar=self.alpha_bar)

    def cpu(self) -> NoisyQueries:
        """Move the images to the CPU, where the steps are."""
        return NoisyQueries(images=self.images.cpu(), timesteps=self.timesteps, alpha_bar=self.alpha_bar)
