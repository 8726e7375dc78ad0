"""The linear map that every head reads encoder stages through."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_GRID = 8
"""Stages wider than this are average-pooled to it, so that heads do not grow with the image."""


class StageEmbedding(nn.Module):
    """One linear map of all encoder stages, each pooled to at most MAX_GRID x MAX_GRID."""

    def __init__(self, stages: list[tuple[int, int]], width: int) -> None:
        super().__init__()
        features = sum(channels * min(size, MAX_GRID) ** 2 for channels, size in stages)
        self.projection = nn.Linear(features, width)

    def forward(self, stages: list[Tensor]) -> Tensor:
        """Embed stages (batch, channel, height, width) into (batch, width)."""
        pooled: Tensor = self.projection(torch.cat([_pool(stage).flatten(1) for stage in stages], dim=1))
        return pooled


def silent_embedding(shapes: list[tuple[int, int]], width: int) -> StageEmbedding:
    """Make an embedding that starts at zero: what it says at first has nothing to do with the images."""
    embedding = StageEmbedding(shapes, width)
    for parameter in embedding.parameters():
        nn.init.zeros_(parameter)
    return embedding


def _pool(stage: Tensor) -> Tensor:
    """Average-pool (..., height, height) by two products; on a CPU adaptive pooling itself takes four times as long."""
    size = stage.shape[-1]
    if size <= MAX_GRID:
        return stage
    means = F.adaptive_avg_pool1d(torch.eye(size, dtype=stage.dtype, device=stage.device), MAX_GRID)
    return means.T @ stage @ means
