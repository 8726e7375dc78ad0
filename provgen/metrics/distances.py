"""Differences between two sets of images: Frechet and kernel distance, precision and recall; and the Vendi score."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import t
from torch import Tensor

from provgen.errors import InputError
from provgen.metrics.neighbors import nearest_others
from provgen.metrics.statistics import Estimate, mean_estimate, proportion

GROUPS = 10
"""Groups of images that are left out in turn, for intervals."""
CHUNK = 1024
"""Rows of the first set that are compared with the second at a time."""
ROUNDING = 1e-12
"""Relative error of squared distances: what is nearer than this to the border of a ball is on the border."""


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Give the squared Frechet distance of Gaussians with the moments of two sets, each (query, feature).

    Heusel et al. 2017 (arXiv 1706.08500), on whatever features are given. It is larger for fewer images.
    """
    means = [rows.double().mean(dim=0) for rows in (first, second)]
    roots = [
        rows.double().sub(mean) / (len(rows) - 1) ** 0.5 for rows, mean in zip((first, second), means, strict=True)
    ]
    # The trace of (C1 C2)^(1/2), with C = R^T R, is the sum of the singular values of R1 R2^T, the roots of the
    # eigenvalues of its product with itself; also where a set spans less than all features. R of a QR decomposition has
    # no more rows than features.
    triangles = [torch.linalg.qr(root, mode="r").R if len(root) > root.shape[1] else root for root in roots]
    common = triangles[0] @ triangles[1].T
    trace = torch.linalg.eigvalsh(common @ common.T).clamp_min(0).sqrt().sum()
    spread = sum(root.square().sum() for root in roots)
    return float((means[0] - means[1]).square().sum() + spread - 2 * trace)


def kernel_distance(first: Tensor, second: Tensor) -> float:
    """Give the unbiased squared kernel distance of two sets, each (query, feature), which may be below 0.

    Binkowski et al. 2018 (arXiv 1801.01401): the kernel is (<x, y> / d + 1)^3.
    """
    within = [_kernel_sum(rows, rows, same=True) / (len(rows) * (len(rows) - 1)) for rows in (first, second)]
    between = _kernel_sum(first, second, same=False) / (len(first) * len(second))
    return float(sum(within) - 2 * between)


def _kernel_sum(first: Tensor, second: Tensor, *, same: bool) -> float:
    total = 0.0
    for number, rows in enumerate(first.double().split(CHUNK)):
        values = (rows @ second.double().T / second.shape[1] + 1) ** 3
        total += float(values.sum())
        if same:
            total -= float(values.diagonal(number * CHUNK).sum())
    return total


def vendi_score(images: Tensor) -> float:
    """Give the effective number of different images, (query, feature), by the cosines between them.

    Friedman and Dieng 2023 (arXiv 2210.02410): 1 for copies of one image, n for n orthogonal ones.
    """
    directions = torch.nn.functional.normalize(images.double(), dim=1)
    # The smaller of the two products of a matrix with itself has the same eigenvalues above 0.
    if len(directions) > directions.shape[1]:
        directions = directions.T
    return effective_number(directions @ directions.T / len(images))


def effective_number(similarities: Tensor) -> float:
    """Give the exponential of the entropy of the eigenvalues of a positive semidefinite matrix with trace 1."""
    values = torch.linalg.eigvalsh(similarities).clamp_min(0)
    return float(torch.special.entr(values).sum().exp())


def with_interval(measure: Callable[..., float], *sets: Tensor) -> Estimate:
    """Measure sets of images (query, feature), with the 95 % interval of a jackknife over random groups of each set.

    Resampling with replacement would add copies, which is what these measures find.

    Raises:
        InputError: A set has fewer images than there are groups.
    """
    if min(len(rows) for rows in sets) < 2 * GROUPS:
        raise InputError(f"an interval needs {2 * GROUPS} images of each kind, got {min(map(len, sets))}")
    generator = torch.Generator().manual_seed(0)
    groups = [torch.randperm(len(rows), generator=generator).to(rows.device) % GROUPS for rows in sets]
    without = [
        measure(*(rows[of_row != group] for rows, of_row in zip(sets, groups, strict=True))) for group in range(GROUPS)
    ]
    value = measure(*sets)
    margin = float(t.ppf(0.975, GROUPS - 1)) * float(np.sqrt((GROUPS - 1) * np.var(without)))
    return Estimate(value, value - margin, value + margin, min(len(rows) for rows in sets))


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


def precision_recall(generated: Tensor, reference: Tensor, *, k: int = 5) -> PrecisionRecall:
    """Compare generated and real images, (query, feature) each, by balls that reach to the k-th nearest other.

    Balls are open, and hold copies of their centre even where they have no radius. Shares have Clopper-Pearson
    intervals, the density has a bootstrap interval over generated images.

    Raises:
        InputError: A set has no more than k images.
    """
    if min(len(generated), len(reference)) <= k:
        raise InputError(
            f"balls of {k} neighbours need more than {k} images, got {len(generated)} and {len(reference)}"
        )
    radii, reference_radii = (
        nearest_others(rows, torch.arange(len(rows), device=rows.device), k).distances[:, -1].square()
        for rows in (generated, reference)
    )
    ball_counts, covered, recalled = [], [], []
    for rows, radii_of_rows in zip(generated.split(CHUNK), radii.split(CHUNK), strict=True):
        distances, rounding = _squared_distances(rows.double(), reference.double())
        is_copy = distances <= rounding
        is_inside = (distances < reference_radii - rounding) | is_copy
        ball_counts.append(is_inside.sum(dim=1))
        covered.append(is_inside.any(dim=0))
        recalled.append(((distances < radii_of_rows[:, None] - rounding) | is_copy).any(dim=0))
    balls = torch.cat(ball_counts)
    return PrecisionRecall(
        precision=proportion(int((balls > 0).sum()), len(generated)),
        recall=proportion(int(torch.stack(recalled).any(dim=0).sum()), len(reference)),
        density=mean_estimate(balls / k, seed=0),
        coverage=proportion(int(torch.stack(covered).any(dim=0).sum()), len(reference)),
    )


def _squared_distances(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Give squared distances of rows by one product, and by how much they may be wrong, both (first, second)."""
    lengths = first.square().sum(dim=1)[:, None] + second.square().sum(dim=1)
    return lengths - 2 * first @ second.T, ROUNDING * lengths
