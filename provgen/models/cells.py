"""Cells: groups of training examples that are told apart before their members are."""

from __future__ import annotations

import math
import warnings

import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

LOG_NOBODY = -20.0
"""Log weight that an anchor without examples starts with; finite, so that it can be learned."""


def log_softmax_within(logits: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Normalise logits (batch, train) over each group of examples apart; `groups` is int64 (train,)."""
    index = groups.expand(len(logits), -1)
    lowest = torch.finfo(logits.dtype).min
    # The largest of the group, not of the row: far groups would underflow.
    largest = logits.new_full((len(logits), num_groups), lowest).scatter_reduce(
        1, index, logits.detach(), "amax"
    )
    shifted = logits - largest.index_select(1, groups)
    totals = logits.new_zeros(len(logits), num_groups).scatter_add(1, index, shifted.exp())
    # An empty group has no example that would read its total.
    return shifted - totals.clamp_min(torch.finfo(logits.dtype).tiny).log().index_select(1, groups)


def kmeans_cells(coordinates: Tensor, num_cells: int) -> Tensor:
    """Cluster coordinates (train, width) into at most `num_cells` cells; int64 (train,)."""
    return torch.from_numpy(_kmeans(coordinates, num_cells).labels_).long()


def class_cells(labels: Tensor) -> Tensor:
    """Number the classes that are present, 0 upwards; int64 (train,)."""
    number: Tensor = labels.unique(return_inverse=True)[1]
    return number


def place_anchors(coordinates: Tensor, cells: Tensor, num_cells: int, per_cell: int) -> tuple[Tensor, Tensor]:
    """Sum every cell up by a few points.

    Args:
        coordinates: (train, width).
        cells: int64 (train,).
        num_cells: Cells, empty ones included.
        per_cell: Points of each cell.

    Returns:
        Points (cell x per_cell, width), and the logarithm of the number of examples near each.
    """
    points = coordinates.new_zeros(num_cells, per_cell, coordinates.shape[1])
    weights = coordinates.new_full((num_cells, per_cell), LOG_NOBODY)
    for cell in cells.unique().tolist():
        members = coordinates[cells == cell]
        found = _kmeans(members, min(per_cell, len(members)))
        kept = len(found.cluster_centers_)
        points[cell, :kept] = torch.from_numpy(found.cluster_centers_)
        counts = torch.from_numpy(found.labels_).long().bincount(minlength=kept).double()
        weights[cell, :kept] = counts.clamp_min(math.exp(LOG_NOBODY)).log()
    return points.flatten(0, 1), weights.flatten()


def log_class_shares(cells: Tensor, labels: Tensor, num_cells: int, num_classes: int) -> Tensor:
    """Give the log share of every class among the examples of every cell.

    The row of the null label, `num_classes`, is 0 where there are examples: it rules out none of them.

    Returns:
        float32 (class + 1, cell), -inf for none.
    """
    counts = torch.zeros(num_classes + 1, num_cells)
    counts.index_put_((labels, cells), torch.ones(len(labels)), accumulate=True)
    sizes = counts.sum(0)
    counts[num_classes] = sizes
    return (counts / sizes.clamp_min(1)).log()


def _kmeans(rows: Tensor, count: int) -> KMeans:
    with warnings.catch_warnings():
        # Fewer distinct images than clusters: some stay empty, which is what they should do.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return KMeans(count, n_init=1, max_iter=50, random_state=0).fit(rows.numpy())
