"""Shares of generated images that lie suspiciously near to the training images."""

from __future__ import annotations

from torch import Tensor

from provgen.analysis.neighbors import Neighbors, nearest, nearest_others
from provgen.analysis.statistics import Estimate, proportion


def authenticity(found: Neighbors, distinct: Tensor) -> Estimate:
    """Give the share of generated images that their nearest training image has a nearer neighbour than.

    Alaa et al. 2022 (arXiv 2102.08921). Copies have 0. A perfect generator does not have 1/2: in d dimensions that are
    locally uniform it has 1/3, 0.379, 0.407 for d = 1, 2, 3, of independent Gaussians 0.76 for d = 32; so read it
    beside the share of held-out images.

    Args:
        found: Neighbours of the generated images among `distinct`.
        distinct: Training images without exact duplicates (`distinct_rows`), (train, feature).
    """
    asked, place = found.indices[:, 0].unique(return_inverse=True)
    among_training = nearest_others(distinct, asked, 1).distances[place, 0]
    return proportion(int((among_training < found.distances[:, 0]).sum()), len(found.distances))


def closer_to_train(found: Neighbors, generated: Tensor, holdout: Tensor) -> Estimate:
    """Give the share of generated images that are nearer to a training image than to any held-out one.

    A generator that has learned no more of the training images than of the held-out ones has N / (N + M), with N
    training and M held-out images; a copier has 1. Ties count half, rounded down.

    Args:
        found: Neighbours of the generated images among the training images.
        generated: (query, feature).
        holdout: (query, feature).
    """
    to_train, to_holdout = found.distances[:, 0], nearest(generated, holdout, 1).distances[:, 0]
    closer = int((to_train < to_holdout).sum()) + int((to_train == to_holdout).sum()) // 2
    return proportion(closer, len(generated))
