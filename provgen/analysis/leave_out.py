"""What leaving out the sources that a method names does to a sample, against leaving out others."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from provgen.analysis.statistics import Estimate, mean_estimate


def strongest_first(scores: Tensor, distances: Tensor) -> Tensor:
    """Order the examples of every query by scores (query, train), the largest first: int64 (query, train).

    Many methods have nothing to say of most examples: where scores are equal, the smallest of `distances`
    (query, train) goes first.
    """
    near = distances.argsort(dim=1, stable=True)
    return near.gather(1, scores.gather(1, near).argsort(dim=1, descending=True, stable=True))


def paired_effect(
    effects: Mapping[str, Tensor], method: str, other: str | None, *, seed: int = 0
) -> Estimate:
    """Give the mean effect of a method over queries, or by how much it exceeds that of another.

    Args:
        effects: By method, (seed, query): the distance a sample moved, or the change of its loss.
        method: Whose sources were left out.
        other: What to compare with, query by query; None for the effect itself.
        seed: Of the bootstrap over queries, each with the mean of its training seeds.
    """
    per_query = effects[method].double().mean(dim=0)
    if other is not None:
        per_query = per_query - effects[other].double().mean(dim=0)
    return mean_estimate(per_query, seed=seed)


def distance_moved(before: Tensor, after: Tensor) -> Tensor:
    """Give the Euclidean distance of pixels in [-1, 1], (query,), of images uint8 (query, channel, height, width)."""
    distance: Tensor = (before.double() - after.double()).flatten(1).norm(dim=1) * (2 / 255)
    return torch.as_tensor(distance)
