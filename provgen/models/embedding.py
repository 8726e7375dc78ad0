"""What index heads read: encoder feature maps, the network's own from some stage on, through one linear map."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

MAX_GRID = 8
"""Feature maps wider than this are average-pooled to it, so that heads do not grow with the image."""


class StageEmbedding(nn.Module):
    """One linear map of all encoder feature maps, each pooled to at most MAX_GRID x MAX_GRID."""

    def __init__(self, feature_maps: list[tuple[int, int]], width: int) -> None:
        super().__init__()
        features = sum(channels * min(size, MAX_GRID) ** 2 for channels, size in feature_maps)
        self.projection = nn.Linear(features, width)

    def forward(self, feature_maps: list[Tensor]) -> Tensor:
        """Embed feature maps (batch, channel, height, width) into (batch, width)."""
        pooled: Tensor = self.projection(torch.cat([_pool(stage).flatten(1) for stage in feature_maps], dim=1))
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


GROUPS = 4
"""Groups of group normalisation; all channel counts in use are multiples of it."""
LEVEL_CHANNELS = 32
"""Channels of the noise-level embedding."""


class OwnEncoder(nn.Module):
    """Feature maps `shared` + 1 to the last, each a convolution or a residual block on the stage before it.

    They have the shapes of the generator's feature maps, so that sharing more or less changes what is trained
    together and not what the heads read. With `shared` = 0 they start from the image, and nothing is shared.
    """

    def __init__(self, shapes: list[tuple[int, int]], *, shared: int, reads_level: bool = True) -> None:
        """Build blocks after the `shared` stages of the generator, which know the noise level if `reads_level`."""
        super().__init__()
        assert 0 <= shared < len(shapes)
        self.shapes, self.shared = shapes, shared
        pairs = list(pairwise(shapes))[shared:]
        has_level = reads_level and len(pairs) > (shared == 0)
        level_channels = LEVEL_CHANNELS if has_level else None
        self.waves = Timesteps(LEVEL_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.level_embedding = TimestepEmbedding(LEVEL_CHANNELS, LEVEL_CHANNELS) if has_level else None
        self.blocks = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1)
            if number == shared == 0
            else ResnetBlock2D(in_channels=before, out_channels=after, temb_channels=level_channels, groups=GROUPS)
            for number, ((before, _), (after, _)) in enumerate(pairs, start=shared)
        )

    def forward(self, feature_maps: list[Tensor], alpha_bar: Tensor) -> list[Tensor]:
        """Give all feature maps but the image, for noise levels `alpha_bar` (batch,).

        Of `feature_maps`, the image and the generator's, those after the shared ones are ignored.
        """
        made = feature_maps[: self.shared + 1]
        level = None
        if self.level_embedding is not None:
            level = self.level_embedding(self.waves(1000 * alpha_bar).to(made[-1].dtype))
        for (_, height), block in zip(self.shapes[self.shared + 1 :], self.blocks, strict=True):
            before = made[-1] if made[-1].shape[-1] == height else F.adaptive_avg_pool2d(made[-1], height)
            made.append(block(before) if isinstance(block, nn.Conv2d) else block(before, level))
        return made[1:]
