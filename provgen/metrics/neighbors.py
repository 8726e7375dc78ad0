"""Nearest rows by Euclidean distance, exact and in bounded memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from provgen.errors import InputError

CHUNK = 1024
"""Rows of queries, and of training rows, that are in memory as float64 at a time."""

# Candidates kept beyond k: rows so close to the k-th that rounding may have put them on the wrong side.
_SPARE_CANDIDATES = 8


class Neighbors(NamedTuple):
    """The nearest training rows of every query."""

    distances: Tensor
    """float64 (query, k), Euclidean, ascending."""
    indices: Tensor
    """int64 (query, k), rows of the training set; the lowest comes first at equal distance."""


def nearest(queries: Tensor, train: Tensor, k: int) -> Neighbors:
    """Find the `k` nearest training rows of each query row.

    Candidates come from one matrix product per pair of chunks, their distances from the differences
    themselves: the product loses near-copies, whose distance is a small difference of large squares.

    Args:
        queries: (query, feature), any dtype that float64 holds.
        train: (train, feature), on the same device.
        k: Neighbours per query, 1 ... `len(train)`.
    """
    assert 1 <= k <= len(train)
    assert queries.shape[1:] == train.shape[1:]
    chunks = [_nearest(rows, train, k) for rows in queries.split(CHUNK)]
    return Neighbors(torch.cat([chunk.distances for chunk in chunks]), torch.cat([chunk.indices for chunk in chunks]))


def distinct_rows(train: Tensor) -> Tensor:
    """Drop exact duplicates of (train, feature): a copy of an image that is there twice would pass for new otherwise.

    Raises:
        InputError: Fewer than two rows are left.
    """
    distinct: Tensor = train.unique(dim=0)
    if len(distinct) < 2:
        raise InputError(f"comparing with training images needs 2 distinct ones, got {len(distinct)}")
    return distinct


def nearest_others(rows: Tensor, wanted: Tensor, k: int) -> Neighbors:
    """Find the `k` nearest other rows (train, feature) of each of the rows `wanted`, int64 (query,)."""
    found = nearest(rows[wanted], rows, k + 1)
    is_self = found.indices == wanted[:, None]
    # Among many duplicates of itself a row need not be there: then the last is one too many.
    is_self[~is_self.any(dim=1), -1] = True
    return Neighbors(found.distances[~is_self].view(-1, k), found.indices[~is_self].view(-1, k))


def _nearest(queries: Tensor, train: Tensor, k: int) -> Neighbors:
    """Do `nearest` for one chunk of queries."""
    candidates = _candidates(queries.double(), train, min(k + _SPARE_CANDIDATES, len(train)))
    candidates = candidates.sort(dim=1).values
    # One rank at a time: (query, feature) in memory, not (query, candidate, feature).
    ranks = [(queries.double() - train[rows].double()).norm(dim=1) for rows in candidates.T]
    distances, order = torch.stack(ranks, dim=1).sort(dim=1, stable=True)
    return Neighbors(distances[:, :k], candidates.gather(1, order)[:, :k])


def _candidates(queries: Tensor, train: Tensor, count: int) -> Tensor:
    """Find the rows of the `count` smallest distances up to rounding: int64 (query, count), in any order."""
    squared = queries.new_empty(len(queries), 0)
    indices = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(train), CHUNK):
        rows = train[start : start + CHUNK].double()
        # |q - x|^2 without |q|^2, which is the same for every training row.
        squared = torch.cat([squared, rows.square().sum(dim=1) - 2 * queries @ rows.T], dim=1)
        numbers = torch.arange(start, start + len(rows), device=queries.device)
        indices = torch.cat([indices, numbers.expand(len(queries), -1)], dim=1)
        squared, kept = squared.topk(min(count, squared.shape[1]), dim=1, largest=False)
        indices = indices.gather(1, kept)
    return indices
