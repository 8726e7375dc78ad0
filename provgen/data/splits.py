"""Held-out splits, random subsets, and the choice of examples that an index head covers."""

from __future__ import annotations

from math import ceil, inf

import numpy as np
import torch
from torch import Tensor

from provgen.errors import InputError


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Hold out the same share of every class, the null label counting as one.

    Args:
        labels: int64 (example,).
        fraction: Share of every class that is held out, rounded; at least one example is kept for training.
        seed: Which examples are held out.

    Returns:
        Train and holdout indices, each int64 and ascending; together they are all examples.
    """
    is_holdout = torch.zeros(len(labels), dtype=torch.bool)
    for members in _shuffled_classes(labels, seed):
        count = min(round(fraction * len(members)), len(members) - 1)
        is_holdout[members[:count]] = True
    return (~is_holdout).nonzero().flatten(), is_holdout.nonzero().flatten()


def stratified_subset(labels: Tensor, count: int, seed: int) -> Tensor:
    """Choose `count` examples (or all, if there are fewer) in the proportions of the classes.

    Args:
        labels: int64 (example,).
        count: Examples to choose, at least 0; what rounding leaves goes to the largest remainders.
        seed: Which examples are chosen.

    Returns:
        Indices int64 (min(count, example),), ascending.
    """
    classes = _shuffled_classes(labels, seed)
    quotas = _largest_remainder([len(members) for members in classes], min(count, len(labels)))
    chosen = [members[:quota] for members, quota in zip(classes, quotas, strict=True)]
    return torch.cat([*chosen, torch.empty(0, dtype=torch.int64)]).sort().values


def subset_masks(labels: Tensor, *, num_subsets: int, fraction: float, seed: int) -> Tensor:
    """Draw subsets of the examples, each with its share of every class.

    Args:
        labels: int64 (example,).
        num_subsets: How many; the first of more are the same.
        fraction: Size of each, as a share of the examples.
        seed: Which examples they have.

    Returns:
        bool (subset, example).
    """
    masks = torch.zeros(num_subsets, len(labels), dtype=torch.bool)
    seeds = torch.randint(2**62, (num_subsets,), generator=torch.Generator().manual_seed(seed))
    for mask, own in zip(masks, seeds.tolist(), strict=True):
        mask[stratified_subset(labels, round(fraction * len(labels)), own)] = True
    return masks


def _shuffled_classes(labels: Tensor, seed: int) -> list[Tensor]:
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shuffled = labels.cpu()[order]
    return [order[shuffled == label] for label in shuffled.unique()]


def _largest_remainder(sizes: list[int], count: int) -> list[int]:
    """Share `count` out in proportion to `sizes`, in integers so that ties fall to the first class."""
    total = max(sum(sizes), 1)
    quotas = [count * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: -(count * sizes[i] % total))
    for i in by_remainder[: count - sum(quotas)]:
        quotas[i] += 1
    return quotas


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
        entropies: Entropy of each example's posterior (`posterior_entropies`) in nats, (train,).
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
