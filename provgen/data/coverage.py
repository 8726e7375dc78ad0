"""Which training images an index head can name, when it shall not be all of them."""

from __future__ import annotations

from math import ceil, inf

import numpy as np
import torch
from torch import Tensor

from provgen.data.splits import stratified_subset
from provgen.errors import InputError


def stratified_coverage(labels: Tensor, count: int, seed: int) -> Tensor:
    """Draw examples in the proportions of the classes, but at least one of every class.

    A class too small for its share gets one example; the other classes share the rest.

    Args:
        labels: int64 (train,); the null label counts as a class.
        count: Examples to cover, from one of every class present to all.
        seed: Which examples are drawn.

    Returns:
        Example indices int64 (count,), ascending.

    Raises:
        InputError: `count` is out of range.
    """
    labels = _possible(labels, count)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    one_of_each = order[_first_of_each_class(labels[order])]
    alone = one_of_each[:0]
    while True:
        shared = (~torch.isin(labels, labels[alone])).nonzero().flatten()
        drawn = shared[stratified_subset(labels[shared], count - len(alone), seed)]
        chosen = torch.cat([alone, drawn])
        missed = one_of_each[~torch.isin(labels[one_of_each], labels[chosen])]
        if not len(missed):
            return chosen.sort().values
        alone = torch.cat([alone, missed])


def k_center_coverage(features: Tensor, labels: Tensor, count: int) -> Tensor:
    """Choose examples so that every other one has a covered one nearby.

    Greedy farthest-first (Gonzalez 1985; Sener and Savarese 2018, arXiv 1708.00489), started with the example
    nearest to the mean of each class. Ties go to the lowest index. O(count x train x feature).

    Args:
        features: Floating (train, feature); Euclidean distances between rows count.
        labels: int64 (train,); the null label counts as a class.
        count: Examples to cover, from one of every class present to all.

    Returns:
        Example indices int64 (count,), ascending.

    Raises:
        InputError: `count` is out of range.
    """
    centers = _nearest_to_class_means(features, _possible(labels, count))
    to_nearest_center = features.new_full((len(features),), inf)
    for number in range(count):
        if number == len(centers):
            centers.append(int(to_nearest_center.argmax()))
        distances = _distances(features, features[centers[number]])
        to_nearest_center = torch.minimum(to_nearest_center, distances)
        # Below the 0 of a copy, so that no example is chosen twice.
        to_nearest_center[centers[number]] = -1
    return torch.tensor(centers).sort().values


def entropy_coverage(entropies: Tensor, labels: Tensor, count: int) -> Tensor:
    """Choose the examples that are hardest to tell apart: the highest entropy of every class, then of all.

    Args:
        entropies: Of each example's posterior (`attribution/coverage_entropy.py`), in nats, (train,).
        labels: int64 (train,); the null label counts as a class.
        count: Examples to cover, from one of every class present to all.

    Returns:
        Example indices int64 (count,), ascending; ties go to the lowest.

    Raises:
        InputError: `count` is out of range.
    """
    labels = _possible(labels, count)
    order = entropies.cpu().argsort(descending=True, stable=True)
    is_first = torch.zeros(len(order), dtype=torch.bool)
    is_first[_first_of_each_class(labels[order])] = True
    return torch.cat([order[is_first], order[~is_first]])[:count].sort().values


def _possible(labels: Tensor, count: int) -> Tensor:
    """Give the labels on the CPU, if `count` examples can hold one of every class."""
    num_classes = len(labels.unique())
    if num_classes <= count <= len(labels):
        return labels.cpu()
    least = ceil(1000 * num_classes / len(labels)) / 1000
    raise InputError(
        f"an index head covers from {num_classes} (one of every class) to all {len(labels)} training images, "
        f"got {count}; set provenance.coverage to between {least:g} and 1"
    )


def _first_of_each_class(labels: Tensor) -> Tensor:
    """Position of the first example of every class present, int64 (class,)."""
    return torch.from_numpy(np.unique(labels.numpy(), return_index=True)[1])


def _nearest_to_class_means(features: Tensor, labels: Tensor) -> list[int]:
    centers = []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        rows = features[members]
        centers.append(int(members[_distances(rows, rows.mean(dim=0)).argmin()]))
    return centers


def _distances(rows: Tensor, point: Tensor) -> Tensor:
    """Euclidean distances (row,) of rows (row, feature) to a point (feature,); exactly 0 for a copy of it."""
    return torch.cdist(point[None], rows, compute_mode="donot_use_mm_for_euclid_dist")[0]
