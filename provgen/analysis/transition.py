"""From copying to generalizing: curves against the number of training images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import exp, log

import torch
from torch import Tensor

from provgen.analysis.statistics import Estimate, mean_estimate


def halves_agreement(first: Tensor, second: Tensor, class_labels: Tensor, *, seed: int = 0) -> Estimate:
    """Say how alike two generators are that share no training image: do they make the same image of the same noise?

    Kadkhodaie et al. 2024 (arXiv 2310.02557). It is 1 minus the distance of the two images of the same noise, in units
    of the mean distance of images of different noises of the same class: 1 for equal images, 0 for no more than that.

    Args:
        first: Images of one generator, (query, feature).
        second: Of the other, of the same noises and classes in the same order.
        class_labels: int64 (query,).
        seed: Of the bootstrap over noises.
    """
    distances = torch.cdist(first.double(), second.double(), compute_mode="donot_use_mm_for_euclid_dist")
    is_other = ~torch.eye(len(first), dtype=torch.bool)
    of_class = is_other & (class_labels[:, None] == class_labels)
    is_other = of_class if of_class.any() else is_other  # one image of each class
    return mean_estimate(1 - distances.diagonal() / distances[is_other].mean(), seed=seed)


def crossing(sizes: Sequence[float], values: Sequence[float], level: float) -> float | None:
    """Give the size at which a curve first crosses a level, interpolated in the logarithm of the size; None if never.

    Args:
        sizes: Rising.
        values: One for each.
        level: What is crossed, from either side.
    """
    for (size, value), (next_size, next_value) in pairwise(zip(sizes, values, strict=True)):
        if value == level:
            return float(size)
        if (value - level) * (next_value - level) <= 0 and value != next_value:
            share = (level - value) / (next_value - value)
            return exp(log(size) + share * (log(next_size) - log(size)))
    return float(sizes[-1]) if len(values) and values[-1] == level else None
