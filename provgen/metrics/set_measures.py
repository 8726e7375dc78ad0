"""All measures of a set of generated images, in three columns: generated, held out, and exact training copies.

Copying is measured in `metrics.copying`. Here are the differences between two sets: Frechet and kernel distance,
precision and recall; and the Vendi score of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import t
from torch import Tensor

from provgen.errors import InputError
from provgen.metrics import copying
from provgen.metrics.neighbors import distinct_rows, nearest, nearest_others
from provgen.metrics.statistics import Estimate, mean_estimate, proportion

FEWEST = 20
"""Images of each kind that a comparison needs, as intervals leave out tenths; held-out ones are halved."""

MAX_SPREAD = 2000
"""Images of each kind for measures whose time grows with their square."""

GROUPS = 10
"""Groups of images that are left out in turn, for intervals."""

CHUNK = 1024
"""Rows of the first set that are compared with the second at a time."""

ROUNDING = 1e-12
"""Relative error of squared distances: what is nearer than this to the border of a ball is on the border."""


@dataclass(frozen=True)
class SetMeasure:
    """One measure of three sets of images."""

    generated: Estimate
    """Score of the generated images."""
    holdout: Estimate
    """Score of a perfect generator: one half of the held-out images, as if it had been generated."""
    copies: Estimate
    """Score of a pure copier: training images."""


def set_measures(generated: Tensor, holdout: Tensor, train: Tensor) -> dict[str, SetMeasure]:
    """Measure three sets of images in the same way, by their features (query, feature); `train` is (train, feature).

    One half of the held-out images is the reference of all three columns, the other half the second column. Sets are
    cut to the same size, as some measures depend on it.

    Raises:
        InputError: A set has too few images.
    """
    size = common_size(len(generated), len(holdout), len(train))
    if size < FEWEST:
        raise InputError(
            f"comparing sets needs {FEWEST} generated, {2 * FEWEST} held-out and {FEWEST} training images, got "
            f"{len(generated)}, {len(holdout)} and {len(train)}"
        )
    generator = torch.Generator().manual_seed(0)
    held = _shuffled(holdout, generator)
    columns = {
        "generated": _shuffled(generated, generator)[:size],
        "holdout": held[:size],
        "copies": _shuffled(train, generator)[:size],
    }
    measure = _Measures(held[size : 2 * size], train)
    measured = [measure(columns[name]) for name in ("generated", "holdout", "copies")]
    return {name: SetMeasure(*(of_set[name] for of_set in measured)) for name in measured[0]}


def common_size(generated: int, holdout: int, train: int) -> int:
    """Give the number of images that every set is cut to."""
    return min(generated, holdout // 2, train)


class _Measures:
    """All measures of a set of images against one reference and one training set."""

    def __init__(self, reference: Tensor, train: Tensor) -> None:
        self.reference, self.distinct = reference, distinct_rows(train)
        self.cells = copying.SpaceCells(train, seed=0)
        self.placed = self._place(reference, nearest(reference, self.distinct, 1).distances)

    def __call__(self, images: Tensor) -> Mapping[str, Estimate]:
        neighbors = nearest(images, self.distinct, 2)
        few, few_of_reference = images[:MAX_SPREAD], self.reference[:MAX_SPREAD]
        return {
            "share_memorized": copying.share_memorized(copying.distance_ratio(neighbors)),
            "data_copying": self._copying(images, neighbors.distances),
            "authenticity": copying.authenticity(neighbors, self.distinct),
            "closer_to_train": copying.closer_to_train(neighbors, images, self.reference),
            **precision_recall(few, few_of_reference)._asdict(),
            "frechet_distance": with_interval(frechet_distance, images, self.reference),
            "kernel_distance": with_interval(kernel_distance, few, few_of_reference),
            "vendi_score": with_interval(vendi_score, few),
        }

    def _copying(self, images: Tensor, distances: Tensor) -> Estimate:
        """Give C_T in units of its deviation where sets are alike, as that depends on the cells."""
        measured = copying.data_copying(self._place(images, distances), self.placed, seed=0)
        c = measured.statistic
        value, low, high = (end / measured.null_deviation for end in (c.value, c.low, c.high))
        return Estimate(value, low, high, c.n)

    def _place(self, images: Tensor, distances: Tensor) -> copying.Placed:
        return copying.Placed(distances[:, 0], self.cells(images))


def _shuffled(rows: Tensor, generator: torch.Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=generator).to(rows.device)]


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Give the squared Frechet distance of Gaussians with the moments of two sets, each (query, feature).

    Heusel et al. 2017 (arXiv 1706.08500), on whatever features are given. It is larger for fewer images.
    """
    means = [rows.double().mean(dim=0) for rows in (first, second)]
    roots = [(rows - mean) / (len(rows) - 1) ** 0.5 for rows, mean in zip((first, second), means, strict=True)]
    # The trace of (C1 C2)^(1/2), with C = R^T R, is the sum of the singular values of R1 R2^T, the roots of the
    # eigenvalues of its product with itself; also where a set spans less than all features.
    common = _triangle(roots[0]) @ _triangle(roots[1]).T
    trace = torch.linalg.eigvalsh(common @ common.T).clamp_min(0).sqrt().sum()
    spread = sum(root.square().sum() for root in roots)
    return float((means[0] - means[1]).square().sum() + spread - 2 * trace)


def _triangle(rows: Tensor) -> Tensor:
    """Give R with R^T R = rows^T rows and no more rows than features."""
    return torch.linalg.qr(rows, mode="r").R if len(rows) > rows.shape[1] else rows


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
    directions = F.normalize(images.double(), dim=1)
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
        InputError: A set has fewer than two images for each group.
    """
    fewest = min(map(len, sets))
    if fewest < 2 * GROUPS:
        raise InputError(f"an interval needs {2 * GROUPS} images of each kind, got {fewest}")
    generator = torch.Generator().manual_seed(0)
    groups = [torch.randperm(len(rows), generator=generator).to(rows.device) % GROUPS for rows in sets]
    without = [
        measure(*(rows[of_row != group] for rows, of_row in zip(sets, groups, strict=True))) for group in range(GROUPS)
    ]
    value = measure(*sets)
    margin = float(t.ppf(0.975, GROUPS - 1)) * float(np.sqrt((GROUPS - 1) * np.var(without)))
    return Estimate(value, value - margin, value + margin, fewest)


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
    """Compare generated images and real ones, (query, feature) each, by balls that reach to the k-th nearest other.

    Balls are open, and hold copies of their centre even where they have no radius. Shares have Clopper-Pearson
    intervals, the density has a bootstrap interval over generated images.

    Raises:
        InputError: A set has no more than k images.
    """
    if min(len(generated), len(reference)) <= k:
        raise InputError(
            f"balls of {k} neighbours need more than {k} images, got {len(generated)} and {len(reference)}"
        )
    radii, reference_radii = (_squared_radii(rows, k) for rows in (generated, reference))
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


def _squared_radii(rows: Tensor, k: int) -> Tensor:
    """Give the squared distance of every row to its k-th nearest other, (row,)."""
    return nearest_others(rows, torch.arange(len(rows), device=rows.device), k).distances[:, -1].square()


def _squared_distances(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Give squared distances of rows by one product, and by how much they may be wrong, both (first, second)."""
    lengths = first.square().sum(dim=1)[:, None] + second.square().sum(dim=1)
    return lengths - 2 * first @ second.T, ROUNDING * lengths
