"""Held-out splits, random subsets, and the choice of examples that an index head covers."""

from __future__ import annotations

from math import ceil, inf

import numpy as np
import torch
from torch import Tensor

from provgen.errors import InputError


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Hold out the rounded share `fraction` of every class, the null label counting as one, but never all of it.

    Gives train and holdout indices, each int64 and ascending; together they are all of `labels`, int64 (example,).
    """
    is_holdout = torch.zeros(len(labels), dtype=torch.bool)
    for members in _shuffled_classes(labels, seed):
        count = min(round(fraction * len(members)), len(members) - 1)
        is_holdout[members[:count]] = True
    return (~is_holdout).nonzero().flatten(), is_holdout.nonzero().flatten()


def stratified_subset(labels: Tensor, count: int, seed: int) -> Tensor:
    """Choose `count` examples (or all, if fewer) in the proportions of `labels`, int64 (example,); ascending int64.

    What rounding leaves goes to the largest remainders.
    """
    classes = _shuffled_classes(labels, seed)
    quotas = _largest_remainder(list(map(len, classes)), min(count, len(labels)))
    chosen = [members[:quota] for members, quota in zip(classes, quotas, strict=True)]
    return torch.cat([*chosen, torch.empty(0, dtype=torch.int64)]).sort().values


def subset_masks(labels: Tensor, *, num_subsets: int, fraction: float, seed: int) -> Tensor:
    """Draw subsets, bool (subset, example), each a `fraction` of every class of `labels`, int64 (example,).

    The first of more subsets are the same.
    """
    masks = torch.zeros(num_subsets, len(labels), dtype=torch.bool)
    seeds = torch.randint(2**62, (num_subsets,), generator=torch.Generator().manual_seed(seed))
    for mask, subset_seed in zip(masks, seeds.tolist(), strict=True):
        mask[stratified_subset(labels, round(fraction * len(labels)), subset_seed)] = True
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
    """Draw ascending example indices, int64 (count,), in the proportions of the classes, but at least one of each.

    A class too small for its share gets one example; the other classes share the rest. As in the other rules of
    coverage, `labels` is int64 (train,), and the null label counts as a class.

    Raises:
        InputError: `count` is fewer than one of every class present, or more than all.
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
    nearest to the mean of each class. Ties go to the lowest index. O(count x train x feature). `features` are points
    in Euclidean space, floating (train, feature); all else is as in `stratified_coverage`.
    """
    centers = _nearest_to_class_means(features, _possible(labels, count))
    to_nearest_center = features.new_full((len(features),), inf)
    for number in range(count):
        if number == len(centers):
            centers.append(int(to_nearest_center.argmax()))
        to_nearest_center = torch.minimum(to_nearest_center, _distances(features, features[centers[number]]))
        # Below the 0 of a copy, so that no example is chosen twice.
        to_nearest_center[centers[number]] = -1
    return torch.tensor(centers).sort().values


def entropy_coverage(entropies: Tensor, labels: Tensor, count: int) -> Tensor:
    """Choose the examples that are hardest to tell apart: the highest entropy of every class, then of all.

    Ties go to the lowest index. `entropies` are those of each example's posterior (`posterior_entropies`) in nats,
    (train,); all else is as in `stratified_coverage`.
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
        points = features[members]
        centers.append(int(members[_distances(points, points.mean(dim=0)).argmin()]))
    return centers


def _distances(points: Tensor, center: Tensor) -> Tensor:
    """Euclidean distances (point,) of points (point, feature) to a center (feature,); exactly 0 for a copy of it."""
    return torch.cdist(center[None], points, compute_mode="donot_use_mm_for_euclid_dist")[0]
