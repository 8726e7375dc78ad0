"""The closed form summed over groups of examples, each summed up by a few weighted points."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from provgen.models.cells import place_anchors
from provgen.models.prototypes import Prototypes


class AnchorMixture(nn.Module):
    """Log probabilities of groups of examples.

    The probability of a group is the sum of the closed form over its members. Here the sum runs over a few anchors
    with weights: a linear layer on the embedding cannot say it (on digits 0.41 and 0.87 nats from the closed form
    after 800 steps, against 0.24 and 0.35), and all examples would cost what the groups are to save.
    """

    def __init__(self, num_groups: int, *, num_examples: int, width: int, share: float) -> None:
        """Build about `share` x sqrt(`num_examples`) anchors, the same number for every group."""
        super().__init__()
        self.num_groups = num_groups
        self.per_group = math.ceil(share * math.sqrt(num_examples) / num_groups)
        self.anchors = Prototypes(num_groups * self.per_group, width)
        self.weights = nn.Parameter(torch.zeros(num_groups * self.per_group))

    def forward(self, embedding: Tensor, signal: Tensor) -> Tensor:
        """Give log probabilities (batch, group) from an embedding (batch, width) and a_t (batch,)."""
        logits: Tensor = self.anchors(embedding, signal) + self.weights
        groups: Tensor = logits.unflatten(1, (self.num_groups, -1)).logsumexp(dim=2).log_softmax(dim=1)
        return groups

    @torch.no_grad()
    def start(self, coordinates: Tensor, groups: Tensor, log_cap: Tensor) -> None:
        """Start at k-means centres of each group of coordinates (train, width); `groups` is int64 (train,)."""
        anchors, weights = place_anchors(coordinates, groups, self.num_groups, self.per_group)
        # An anchor stands for examples around it, which is noise on top of the noise.
        self.anchors.start(anchors, log_cap - 1)
        self.weights.copy_(weights)
