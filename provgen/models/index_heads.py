"""Index heads: from encoder stages to logits over training examples.

Every head is called as `head(stages, signal, class_labels, class_logits)` and started by `head.start(images, labels)`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from torch import Tensor, nn

MAX_GRID = 8
"""Stages wider than this are average-pooled to it, so that heads do not grow with the image."""

CLEAR_CALL = 40.0
"""Nats between an example and its nearest neighbour at which the learned cap of the inverse temperature starts:
beyond it a sharper posterior says nothing more, and the cleanest images would dominate the loss."""

NEIGHBOR_SAMPLE = 2000
"""Training examples among which the typical nearest-neighbour distance is measured."""


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


class ClassIndependentHead(nn.Module):
    """One softmax over all training examples.

    The Bayes posterior of the forward process has logits sqrt(a)/(1-a) (<x_t, x_i> - sqrt(a) |x_i|^2 / 2)
    (`attribution/posterior.py`), from any origin. The head has the same form with a learned embedding
    e(x_t, t, y) in place of x_t, a learned prototype for every x_i and a learned bias for |x_i|^2 / 2. The
    inverse temperature is known from the noise level, up to a learned cap.
    """

    reads_class_logits = False

    def __init__(self, shapes: list[tuple[int, int]], *, num_examples: int, width: int) -> None:
        super().__init__()
        self.embedding = StageEmbedding(shapes, width)
        for parameter in self.embedding.parameters():
            nn.init.zeros_(parameter)
        self.prototypes = nn.Parameter(torch.randn(num_examples, width) / math.sqrt(width))
        self.bias = nn.Parameter(torch.zeros(num_examples))
        self.log_cap = nn.Parameter(torch.tensor(math.log(CLEAR_CALL)))

    def forward(
        self,
        stages: list[Tensor],
        signal: Tensor,
        class_labels: Tensor,  # noqa: ARG002 - the call that all heads share
        class_logits: Tensor | None,  # noqa: ARG002
    ) -> Tensor:
        """Give index logits (batch, train) from stages and the signal level a_t in (0, 1], (batch,)."""
        sharpness = _capped_inverse_temperature(signal, self.log_cap.exp())
        # At least float32: a softmax over thousands of examples needs the digits, even of half-precision weights.
        similarity = F.linear(self.embedding(stages), self.prototypes).to(signal.dtype)
        return sharpness[:, None] * (similarity - signal.sqrt()[:, None] * self.bias)

    @torch.no_grad()
    def start(self, images: Tensor, labels: Tensor) -> None:  # noqa: ARG002 - the call that all heads share
        """Start the prototypes at the principal coordinates of the training images.

        The embedding then only has to learn the same coordinates of x_t. On digits this is the difference
        between a gap to the closed form of 2.3 nats and of 0.1 after 900 steps.

        Args:
            images: (train, channel, height, width), in [-1, 1].
            labels: int64 (train,); this head has no use for them.
        """
        rows = images.flatten(1).double().cpu().numpy()
        width = min(self.prototypes.shape[1], *rows.shape)
        coordinates = torch.from_numpy(PCA(width, random_state=0).fit_transform(rows))
        self.prototypes.zero_()
        self.prototypes[:, :width] = coordinates.to(self.prototypes)
        self.bias.copy_(coordinates.square().sum(1) / 2)
        distance = _typical_squared_distance(coordinates)
        if distance > 0:  # else the images are all the same, and any cap will do
            self.log_cap.copy_((2 * CLEAR_CALL / distance).log())


class ClassConditionalHead(nn.Module):
    """A class, then one of M slots shared by all classes."""

    reads_class_logits = True

    def __init__(
        self,
        shapes: list[tuple[int, int]],
        *,
        num_examples: int,
        width: int,
        num_classes: int,
        num_slots: int,
    ) -> None:
        super().__init__()
        raise NotImplementedError


class TwoStageHead(nn.Module):
    """A cell of alike examples, then one of its examples."""

    reads_class_logits = False

    def __init__(
        self,
        shapes: list[tuple[int, int]],
        *,
        num_examples: int,
        width: int,
        num_cells: int,
        cells: str = "kmeans",
    ) -> None:
        super().__init__()
        raise NotImplementedError


def _capped_inverse_temperature(signal: Tensor, cap: Tensor) -> Tensor:
    """Give sqrt(a)/(1-a), of the forward process, softly capped; the cap itself at a = 1."""
    root = signal.sqrt()
    return root * cap / (root + (1 - signal) * cap)


def _typical_squared_distance(rows: Tensor) -> Tensor:
    """Median squared distance to the nearest other row, among evenly spaced rows of (train, feature)."""
    some = rows[:: -(-len(rows) // NEIGHBOR_SAMPLE)]
    nearest = torch.cdist(some, some).fill_diagonal_(math.inf).min(dim=1).values
    # Exact duplicates must not make the cap infinite.
    return nearest.square().median().clamp_min(1e-6 * some.square().sum(1).mean())


def _pool(stage: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(stage, MAX_GRID) if stage.shape[-1] > MAX_GRID else stage
