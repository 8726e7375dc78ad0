"""Does a generator copy? Nearest training images, the distance ratio, the share that is memorized.

The ratio is a similarity: it says how near an image lies to the training set, not why. On independent images
that are locally uniform in d dimensions it falls below r with probability r^d, which is nil for images but
11 % at r = 1/3 in two dimensions: always print the same share for held-out images beside it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from provgen.analysis.statistics import Estimate, proportion
from provgen.errors import InputError

# Candidates kept beyond k: rows so close to the k-th that rounding may have put them on the wrong side.
_SPARE_CANDIDATES = 8


class Neighbors(NamedTuple):
    """The nearest training rows of every query."""

    distances: Tensor
    """float64 (query, k), Euclidean, ascending."""
    indices: Tensor
    """int64 (query, k), rows of the training set; the lowest comes first at equal distance."""


def nearest(queries: Tensor, train: Tensor, k: int, *, chunk_size: int = 1024) -> Neighbors:
    """Find the `k` nearest training rows of each query row.

    Candidates come from one matrix product per pair of chunks, their distances from the differences
    themselves: the product loses near-copies, whose distance is a small difference of large squares.

    Args:
        queries: (query, feature), any dtype that float64 holds.
        train: (train, feature), on the same device.
        k: Neighbours per query, 1 ... `len(train)`.
        chunk_size: Rows of queries and of training rows in memory as float64 at a time.
    """
    assert 1 <= k <= len(train)
    assert queries.shape[1:] == train.shape[1:]
    chunks = [_nearest(rows, train, k, chunk_size) for rows in queries.split(chunk_size)]
    return Neighbors(
        torch.cat([chunk.distances for chunk in chunks]), torch.cat([chunk.indices for chunk in chunks])
    )


def distance_ratio(queries: Tensor, train: Tensor, *, chunk_size: int = 1024) -> Tensor:
    """Divide each query's distance to its nearest training image by that to the second nearest.

    Exact duplicates in the training set count once; otherwise a copy of an image that is there twice would
    have two equal distances and pass for new.

    Args:
        queries: (query, feature), such as flattened pixels.
        train: (train, feature), on the same device.
        chunk_size: Rows of either in memory as float64 at a time.

    Returns:
        float64 (query,) in [0, 1]; 0 is an exact copy.

    Raises:
        InputError: `train` has fewer than two distinct rows.
    """
    distinct = train.unique(dim=0)
    if len(distinct) < 2:
        raise InputError(f"the distance ratio needs 2 distinct training images, got {len(distinct)}")
    distances = nearest(queries, distinct, 2, chunk_size=chunk_size).distances
    # Yoon et al. 2023 (SPIGM workshop at ICML), used by Gu et al. 2023, arXiv 2310.02664.
    return distances[:, 0] / distances[:, 1]


def share_memorized(ratios: Tensor, threshold: float = 1 / 3) -> Estimate:
    """Give the share of `ratios` (query,) strictly below `threshold`: the 1/3 rule of Yoon et al. 2023.

    Raises:
        InputError: `ratios` is empty.
    """
    return proportion(int((ratios < threshold).sum()), len(ratios))


def _nearest(queries: Tensor, train: Tensor, k: int, chunk_size: int) -> Neighbors:
    """Do `nearest` for one chunk of queries."""
    candidates = _candidates(queries.double(), train, min(k + _SPARE_CANDIDATES, len(train)), chunk_size)
    candidates = candidates.sort(dim=1).values
    # One rank at a time: (query, feature) in memory, not (query, candidate, feature).
    ranks = [(queries.double() - train[rows].double()).norm(dim=1) for rows in candidates.T]
    distances, order = torch.stack(ranks, dim=1).sort(dim=1, stable=True)
    return Neighbors(distances[:, :k], candidates.gather(1, order)[:, :k])


def _candidates(queries: Tensor, train: Tensor, count: int, chunk_size: int) -> Tensor:
    """Find the rows of the `count` smallest distances up to rounding: int64 (query, count), in any order."""
    squared = queries.new_empty(len(queries), 0)
    indices = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(train), chunk_size):
        rows = train[start : start + chunk_size].double()
        # |q - x|^2 without |q|^2, which is the same for every training row.
        squared = torch.cat([squared, rows.square().sum(dim=1) - 2 * queries @ rows.T], dim=1)
        numbers = torch.arange(start, start + len(rows), device=queries.device)
        indices = torch.cat([indices, numbers.expand(len(queries), -1)], dim=1)
        squared, kept = squared.topk(min(count, squared.shape[1]), dim=1, largest=False)
        indices = indices.gather(1, kept)
    return indices
