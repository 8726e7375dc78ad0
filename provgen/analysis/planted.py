"""Queries whose source is known: draws from a kernel density around training images, and how often they are traced."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from provgen.analysis.statistics import Estimate, mean_estimate, proportion


@dataclass(frozen=True, kw_only=True)
class PlantedQueries:
    """x_parent + s * noise."""

    images: Tensor
    """(query, channel, height, width), in the range of the training images up to the noise."""
    parents: Tensor
    """int64 (query,), rows of the training set."""
    bandwidth: float
    """s, standard deviation of the noise of every pixel."""


def plant(train_images: Tensor, count: int, *, bandwidth: float, seed: int) -> PlantedQueries:
    """Draw from the kernel density estimate with a Gaussian kernel, and keep the parents.

    Args:
        train_images: Floating (train, channel, height, width).
        count: Queries.
        bandwidth: s.
        seed: Of parents and noise.
    """
    generator = torch.Generator().manual_seed(seed)
    parents = torch.randint(len(train_images), (count,), generator=generator)
    noise = torch.randn((count, *train_images.shape[1:]), generator=generator, dtype=train_images.dtype)
    return PlantedQueries(
        images=train_images[parents] + bandwidth * noise, parents=parents, bandwidth=bandwidth
    )


def source_groups(train_images: Tensor) -> Tensor:
    """Number the distinct images, int64 (train,): exact copies are one source, as nobody could tell them apart."""
    groups: Tensor = train_images.flatten(1).unique(dim=0, return_inverse=True)[1]
    return groups


def bayes_hits(
    planted: PlantedQueries, train_images: Tensor, groups: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Trace as well as can be done: by the exact posterior of the parent's group.

    Returns:
        Whether the parent's group is among the k most probable, bool (query,), and how sure of it the posterior is,
        (query,): both have the mean that no tracer can exceed, and the second varies less.
    """
    squares = torch.cdist(planted.images.flatten(1).double(), train_images.flatten(1).double()).square()
    posterior = (-squares / (2 * planted.bandwidth**2)).softmax(dim=1)
    by_group = torch.zeros(len(posterior), int(groups.max()) + 1, dtype=torch.float64)
    by_group.index_add_(1, groups, posterior)
    best = by_group.topk(min(k, by_group.shape[1]), dim=1)
    is_parent = best.indices == groups[planted.parents][:, None]
    return is_parent.any(dim=1), best.values.sum(dim=1)


def precision_at(scores: Tensor, parents: Tensor, groups: Tensor, k: int) -> Estimate:
    """Give the share of queries whose parent, or a copy of it, is among the first k sources.

    Args:
        scores: (query, train).
        parents: int64 (query,).
        groups: int64 (train,), of `source_groups`; every group counts as one of the k, with its best example.
        k: Sources looked at.
    """
    best = torch.full((len(scores), int(groups.max()) + 1), -torch.inf, dtype=scores.dtype)
    best.scatter_reduce_(1, groups.expand(len(scores), -1), scores, reduce="amax")
    first = best.topk(min(k, best.shape[1]), dim=1).indices
    hits = (first == groups[parents][:, None]).any(dim=1)
    return proportion(int(hits.sum()), len(hits))


def reliability(
    posterior: Tensor, parents: Tensor, groups: Tensor, edges: Tensor
) -> list[tuple[Estimate, Estimate]]:
    """Compare what a tracer believes of its first source with how often that is the parent.

    Args:
        posterior: (query, train), beliefs that sum to 1 at most.
        parents: int64 (query,).
        groups: int64 (train,), of `source_groups`.
        edges: Ascending (bin + 1,) over [0, 1]; a belief on an edge falls into the bin above.

    Returns:
        For every bin that has queries: mean belief, and share that is right.
    """
    by_group = torch.zeros(len(posterior), int(groups.max()) + 1, dtype=torch.float64)
    by_group.index_add_(1, groups, posterior.double())
    belief, first = by_group.max(dim=1)
    is_right = first == groups[parents]
    places = torch.bucketize(belief, edges[1:-1].double(), right=True)
    return [
        (mean_estimate(belief[places == place], seed=0), proportion(int(is_right[places == place].sum()), n))
        for place in range(len(edges) - 1)
        if (n := int((places == place).sum()))
    ]
