"""Class-stratified choices of examples, each a function of the labels and a seed alone."""

from __future__ import annotations

import torch
from torch import Tensor


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
