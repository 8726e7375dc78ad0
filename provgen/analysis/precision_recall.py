"""Precision, recall, density and coverage: do two sets of images lie in the same places?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from provgen.analysis.neighbors import nearest_others
from provgen.analysis.statistics import Estimate, mean_estimate, proportion
from provgen.errors import InputError

CHUNK = 1024
"""Rows of either set whose distances are in memory at a time."""


ROUNDING = 1e-12
"""Of squared distances, relative to squared lengths: what is nearer than this to the border of a ball is on it."""


class PrecisionRecall(NamedTuple):
    """Kynkaanniemi et al. 2019 (arXiv 1904.06991) and Naeem et al. 2020 (arXiv 2002.09797)."""

    precision: Estimate
    """Share of generated images inside a ball of a reference image, as far as its k-th nearest other."""
    recall: Estimate
    """Share of reference images inside such a ball of a generated image."""
    density: Estimate
    """Balls of reference images around a generated one, in units of k; 1 on average where both are alike."""
    coverage: Estimate
    """Share of reference images whose ball holds a generated image."""


def precision_recall(generated: Tensor, reference: Tensor, *, k: int = 5, seed: int = 0) -> PrecisionRecall:
    """Compare two sets of images. Balls are open, and hold copies of their centre even where they have no radius.

    Args:
        generated: (query, feature).
        reference: Real images, (query, feature).
        k: Neighbours that a ball reaches to.
        seed: Of the bootstrap interval of the density; shares have Clopper-Pearson intervals.

    Raises:
        InputError: A set has no more than k images.
    """
    if min(len(generated), len(reference)) <= k:
        raise InputError(
            f"balls of {k} neighbours need more than {k} images, got {len(generated)} and {len(reference)}"
        )
    own, theirs = (
        nearest_others(rows, torch.arange(len(rows), device=rows.device), k).distances[:, -1].square()
        for rows in (generated, reference)
    )
    balls, is_recalled, is_covered = (
        [],
        torch.zeros(len(reference), dtype=torch.bool, device=reference.device),
        [],
    )
    for some, radii in zip(generated.split(CHUNK), own.split(CHUNK), strict=True):
        distances, rounding = _squared_distances(some.double(), reference.double())
        is_copy = distances <= rounding
        inside = (distances < theirs - rounding) | is_copy
        balls.append(inside.sum(dim=1))
        is_covered.append(inside.any(dim=0))
        is_recalled |= ((distances < radii[:, None] - rounding) | is_copy).any(dim=0)
    found = torch.cat(balls)
    return PrecisionRecall(
        precision=proportion(int((found > 0).sum()), len(generated)),
        recall=proportion(int(is_recalled.sum()), len(reference)),
        density=mean_estimate(found / k, seed=seed),
        coverage=proportion(int(torch.stack(is_covered).any(dim=0).sum()), len(reference)),
    )


def _squared_distances(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Give squared distances of rows by one product, and by how much they may be wrong, both (first, second)."""
    lengths = first.square().sum(dim=1)[:, None] + second.square().sum(dim=1)
    return lengths - 2 * first @ second.T, ROUNDING * lengths
